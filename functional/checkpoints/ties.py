"""Tied tensors of which a checkpoint has several: are they the same there? No torch."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...specs.stored import StoredTensor
    from .assembly import Assembly

_PROBE_BYTES = 65536


def differ(folder: str, one: Assembly, other: Assembly) -> bool:
    """Tell whether two stored tensors are seen to differ: in shape, in dtype, or in bytes at their beginning, middle or end.

    Trained apart they differ nearly everywhere, so that little of them has to be read. What is put together from several
    parts is only held to the same shape and dtype.
    """
    if one.shape != other.shape or len({part.stored.dtype for part in (*one.parts, *other.parts)}) > 1:
        return True
    match (*one.parts, *other.parts):
        case (first, second) if first.box == second.box:
            return _probes(folder, first.stored) != _probes(folder, second.stored)
        case _:
            return False


def _probes(folder: str, stored: StoredTensor) -> list[bytes]:
    """Return some bytes of a stored tensor."""
    size = prod(stored.shape) * stored.item_bytes
    found: list[bytes] = []
    with (Path(folder) / stored.file).open("rb") as file:
        for start in (0, size // 2, max(0, size - _PROBE_BYTES)):
            file.seek(stored.offset + start)
            found.append(file.read(min(_PROBE_BYTES, size - start)))
    return found
