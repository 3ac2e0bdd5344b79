"""Split axes as listings and errors print them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .factors import Axis, Parts, holders, local_size, parts_in, size_of

_MAX_BLOCKS = 4


@lru_cache(maxsize=4096)
def text(axis: Axis, mesh_axis: str = "tensor") -> str:
    """Return the printed form of an axis, as specs print theirs.

    >>> from shardplan.functional.types.factors import Whole, whole
    >>> text((Whole(2), Parts(2, ((0,), (1,))), Whole(8))), text((Parts(3, ((0, 1), (2,))),)), text(whole(4096))
    ('16|16@tensor', '3@tensor(uneven)', '4096')
    """
    parts = parts_in(axis)
    if parts is None:
        is_local = size_of(axis) != local_size(axis)
        return f"{size_of(axis)}@{mesh_axis}(equal)" if is_local else str(size_of(axis))
    place = axis.index(parts)
    num, inner = size_of(axis[:place]), size_of(axis[place + 1 :])
    added = sum(entry >= parts.size for own in parts.held for entry in own)
    blocks = "|".join(str(size * inner) for size in _blocks(parts)) + (f"+{added * inner}" if added else "")
    is_uneven = len(set(map(len, parts.held))) > 1
    how = "(repeated)" if holders(axis) == "repeated" else "(uneven)" if is_uneven else ""
    if num > _MAX_BLOCKS:
        return f"{num}x({blocks}@{mesh_axis}{how})"
    return f"{'|'.join([blocks] * num)}@{mesh_axis}{how}"


def _blocks(parts: Parts) -> list[int]:
    """Return the sizes of the blocks of each of which ranks have equally many in order; the size if there are none."""
    if len({len(own) for own in parts.held}) > 1:
        return [parts.size]
    entries = np.array(parts.held)
    _, at = np.unique(entries.T, return_index=True)  # entries 0, 1, ..., and where ranks, side by side, have them first
    num_had = np.cumsum(np.bincount(at // len(entries), minlength=entries.shape[1]))
    is_end = num_had == np.maximum.accumulate(entries.max(axis=0)) + 1
    ends = np.unique(num_had[is_end]).tolist()
    return np.diff([0, *ends]).tolist() if ends and ends[-1] == parts.size else [parts.size]
