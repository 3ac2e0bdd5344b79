"""Measure the CPU seconds of a command with all processes that it starts, also those that outlive their parents.

``python benchmarks/cpu_seconds.py make test`` runs ``make test``, and prints CPU and wall seconds when all have ended. The
shell's ``time`` misses processes whose parent does not wait for them, such as the ranks that the tests fork. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress

PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphaned descendants become children of this process, which waits for them and so counts them."""


def main(command: list[str]) -> int:
    """Run a command; print the CPU seconds of its whole tree of processes; return its exit status."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    start = time.monotonic()
    status = subprocess.run(command, check=False).returncode  # noqa: S603  it is the command that is asked for
    with suppress(ChildProcessError):  # raised when no child is left
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"CPU {used.ru_utime + used.ru_stime:.1f} s (user {used.ru_utime:.1f} s, system {used.ru_stime:.1f} s), "
        f"wall {time.monotonic() - start:.1f} s: {' '.join(command)}"
    )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
