"""Checksums that reveal damaged weights, compiled for the CPU.

The checksum of a stored tensor with elements x_i, as unsigned integers of their own size, is Σ x_i · (2i + 1) modulo 2^64.
The weights are odd, so that each bit counts: flipping bit k of x_i changes the sum by 2^k · (2i + 1), which is never 0.
Exchanging two elements changes the sum by 2 (x_i - x_j) (j - i), which is never 0 for elements of 4 bytes or fewer. The
sums of disjoint parts add up to the sum of the whole, so that ranks that read a part each check the tensor together.

Cf. Fletcher, "An arithmetic checksum for serial transmissions", 1982, which weighs places too.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ...specs.index import row_major
from ...specs.intervals import placed
from ..init.numba_cache import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...specs.index import Index
    from .byte_ranges import Selection

MODULUS = 2**64
_WORD = 8


def position_sum(elements: NDArray[Any], start: int = 0) -> int:
    """Return the checksum of consecutive elements of a stored tensor.

    Args:
        elements: The elements as unsigned integers; an element of 16 bytes as two.
        start: Position of the first element in the stored tensor.

    >>> import numpy as np
    >>> whole = np.array([7, 0, 2, 65535], np.uint16)
    >>> position_sum(whole), position_sum(whole[:1]) + position_sum(whole[1:], start=1)
    (458762, 458762)
    """
    flat = np.ascontiguousarray(elements).reshape(-1)
    return int(_sum(flat, *(np.array([number], np.int64) for number in (0, flat.size, start))))


def sum_selected(raw: NDArray[np.uint8], selection: Selection, counted: Index) -> int:
    """Return the checksum of the elements of a selection that lie in ``counted``.

    Args:
        raw: The selection's bytes, in the order of the file.
        selection: The selection.
        counted: The intervals of each stored axis whose elements count.
    """
    item = selection.stored.item_bytes
    words = max(1, item // _WORD)
    whole, held = (*selection.stored.shape, words), (*selection.shape, words)
    met = (placed(*pair) for pair in zip(selection.entries, counted, strict=True))
    # of each axis the first entry of each interval, its place among the selected entries, and its length
    axes = [[(low, at, high - low) for (low, high), (at, _) in along] for along in met] + [[(0, 0, words)]]
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


@compiled
def _sum(x: Any, begins: Any, sizes: Any, positions: Any) -> Any:
    total = np.uint64(0)
    for run in range(len(begins)):
        row = x[begins[run] : begins[run] + sizes[run]]
        plain = np.uint64(0)
        weighted = np.uint64(0)
        for place in range(len(row)):  # the compiler turns this loop into SIMD
            element = np.uint64(row[place])
            plain += element
            weighted += element * np.uint64(place)
        total += np.uint64(2) * weighted + (np.uint64(2) * np.uint64(positions[run]) + np.uint64(1)) * plain
    return total
