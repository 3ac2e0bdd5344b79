"""The memory of this machine and of this process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from pathlib import Path

import numpy as np


def touch(num_bytes: int) -> None:
    """Touch memory in a process that ends: pages that a virtual machine has not used for a while come slowly."""
    num_bytes = min(num_bytes, int(0.7 * _kibibytes("/proc/meminfo", "MemAvailable")))
    process = multiprocessing.get_context("fork").Process(target=np.ones, args=(num_bytes, np.uint8), daemon=True)
    process.start()
    process.join(60)
    process.kill()
    process.join(10)


def settle() -> int:
    """Return the anonymous memory of this process, and let its peak start anew from there."""
    gc.collect()  # its marks copy the pages that are shared with the parent, before the clock
    ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back, so that what is taken shows
    Path("/proc/self/clear_refs").write_text("5")
    return _status("RssAnon")


def peak() -> int:
    """Return the most anonymous memory since then: mapped files count in the kernel's figure too, and only grow."""
    return _status("VmHWM") - _status("RssFile") - _status("RssShmem")


def _status(name: str) -> int:
    return _kibibytes("/proc/self/status", name)


def _kibibytes(file: str, name: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
