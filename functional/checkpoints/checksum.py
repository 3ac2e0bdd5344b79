"""Sums by which damaged weights are found out, compiled for the CPU. No torch.

Of a stored tensor with elements x_i, as unsigned integers of their own size, the sum is Σ x_i · (2i + 1) modulo 2^64. The
weights are odd, so that each bit counts: one that flips changes the sum by 2^k · (2i + 1), which is never 0. Two elements
that change places change it by 2 (x_i - x_j) (j - i), which is not 0 either where they have 4 bytes or fewer. The sums of
parts add up to that of the whole, so that ranks which read a part each check it together.

Cf. Fletcher, "An arithmetic checksum for serial transmissions", 1982, which weighs places too.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ...specs.index import row_major
from ..init.numba_cache import compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ...specs.index import Index
    from ...specs.shard import Interval
    from .byte_ranges import Taken

MODULUS = 2**64
_WORD = 8


def position_sum(elements: NDArray[Any], start: int = 0) -> int:
    """Return the sum of neighbouring elements of a stored tensor.

    Args:
        elements: As unsigned integers; of 16 bytes each as two.
        start: Place of the first one in the stored tensor.

    >>> import numpy as np
    >>> whole = np.array([7, 0, 2, 65535], np.uint16)
    >>> position_sum(whole), position_sum(whole[:1]) + position_sum(whole[1:], start=1)
    (458762, 458762)
    """
    flat = np.ascontiguousarray(elements).reshape(-1)
    return int(_sum(flat, *(np.array([number], np.int64) for number in (0, flat.size, start))))


def sum_taken(raw: NDArray[np.uint8], taken: Taken, counted: Index) -> int:
    """Return the sum of those elements that count, of what was taken of a stored tensor.

    Args:
        raw: The bytes that were taken, in the order of the file.
        taken: What they are.
        counted: The intervals of each axis of the stored tensor whose elements count.
    """
    item = taken.stored.item_bytes
    words = max(1, item // _WORD)
    whole, held = (*taken.stored.shape, words), (*taken.shape, words)
    axes = [_meeting(*pair) for pair in zip(taken.entries, counted, strict=True)] + [[(0, 0, words)]]
    if not all(axes):
        return 0
    inner = len(axes) - 1
    while inner and whole[inner] == held[inner] == axes[inner][0][2]:
        inner -= 1
    place, position = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for axis in range(inner):
        entries = [(at + number, start + number) for start, at, size in axes[axis] for number in range(size)]
        ats, starts = np.array(entries, np.int64).T
        place = np.add.outer(place, ats * row_major(held)[axis]).reshape(-1)
        position = np.add.outer(position, starts * row_major(whole)[axis]).reshape(-1)
    unit = prod(held[inner + 1 :])
    starts, ats, sizes = (np.array(column, np.int64) * unit for column in zip(*axes[inner], strict=True))
    begins, positions = (np.add.outer(*pair).reshape(-1) for pair in ((place, ats), (position, starts)))
    return int(_sum(raw.view(f"u{min(item, _WORD)}"), begins, np.tile(sizes, len(place)), positions))


def _meeting(taken: Sequence[Interval], counted: Sequence[Interval]) -> list[tuple[int, int, int]]:
    """Return where two sets of intervals meet: first entry, its place among those that are taken, and how many."""
    found: list[tuple[int, int, int]] = []
    place = 0
    for start, stop in taken:
        meets = ((max(start, low), min(stop, high)) for low, high in counted)
        found += [(low, place + low - start, high - low) for low, high in meets if low < high]
        place += stop - start
    return found


@compiled
def _sum(x: Any, begins: Any, sizes: Any, positions: Any) -> Any:
    total = np.uint64(0)
    for run in range(len(begins)):
        row = x[begins[run] : begins[run] + sizes[run]]
        plain = np.uint64(0)
        weighted = np.uint64(0)
        for place in range(len(row)):  # what the compiler turns into SIMD
            element = np.uint64(row[place])
            plain += element
            weighted += element * np.uint64(place)
        total += np.uint64(2) * weighted + (np.uint64(2) * np.uint64(positions[run]) + np.uint64(1)) * plain
    return total
