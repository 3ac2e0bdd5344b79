"""Memory as bars, one for all ranks with the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....specs.dtypes import human_bytes
from ....specs.mesh import MESH_AXES
from ....specs.text_table import ranges

if TYPE_CHECKING:
    from ....specs.memory import Memory, Share
    from ....specs.mesh import Coordinate
    from ....specs.report import Report

_STACKED = ("parameter", "buffer", "gradient", "optimizer", "master", "bucket", "boundary")
_NAMES = {
    **dict(zip(_STACKED, ("parameters", "buffers", "gradients", "optimizer", "master", "buckets", "boundary"), strict=True)),
    "training": "training",
    "activation": "activations~",
    "checkpointed": "checkpointed~",
    "executing": "executing",
    "peak": "peak",
    "replicated": "replicated",
}
_OPTIONAL = (*_STACKED[2:], "activation", "checkpointed")


def memory(report: Report) -> dict[str, Any]:
    """Return the bars, the bytes at full width, and the capacity of a device."""
    alike = _alike(report)
    peaks = [max(memory.peak_bytes, memory.checkpointed_peak_bytes) for memory in alike]
    shown = [name for name in _NAMES if name not in _OPTIONAL or any(getattr(memory, f"{name}_bytes") for memory in alike)]
    return {
        "parts": [name for name in _STACKED if name in shown],
        "columns": [[name, _NAMES[name]] for name in shown],
        "rows": [_row(memory, shares, shown, report.device_memory) for memory, shares in alike.items()],
        "scale": max(*peaks, report.device_memory or 0, 1),
        "capacity": None if report.device_memory is None else [report.device_memory, human_bytes(report.device_memory)],
    }


def memory_rows(report: Report) -> dict[Coordinate, int]:
    """Return the number of the bar of each distinct coordinate."""
    return {share.coordinate: number for number, shares in enumerate(_alike(report).values()) for share in shares}


def _alike(report: Report) -> dict[Memory, list[Share]]:
    alike: dict[Memory, list[Share]] = {}
    for share in report.shares:
        alike.setdefault(share.memory, []).append(share)
    return alike


def _row(memory: Memory, shares: list[Share], shown: list[str], device_memory: int | None) -> dict[str, Any]:
    sizes = {name: getattr(memory, f"{name}_bytes") for name in shown}
    first = shares[0].coordinate
    return {
        "stages": ranges(dict.fromkeys(share.coordinate.pipe for share in shares)),
        "stage": first.pipe,
        "ranks": f"{sum(share.num_ranks for share in shares):,}",
        "first": first.rank,
        "at": ", ".join(f"{mesh_axis} {first.index(mesh_axis)}" for mesh_axis in MESH_AXES),
        "bytes": sizes,
        "text": {name: "not known" if size is None else human_bytes(size) for name, size in sizes.items()},
        "over": device_memory is not None and memory.peak_bytes > device_memory,
    }
