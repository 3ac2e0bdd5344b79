"""A part of a tensor: along each axis some of its entries."""

from __future__ import annotations

from math import prod

from .intervals import Interval

Index = tuple[tuple[Interval, ...], ...]
"""A part of a tensor: for each axis the intervals of it, in order."""


def index_shape(index: Index) -> tuple[int, ...]:
    """Return the shape of a part.

    >>> index_shape((((0, 4),), ((0, 3), (6, 9))))
    (4, 6)
    """
    return tuple(sum(stop - start for start, stop in intervals) for intervals in index)


def whole_index(shape: tuple[int, ...]) -> Index:
    """Return the part that is all of a tensor.

    >>> whole_index((4, 3))
    (((0, 4),), ((0, 3),))
    """
    return tuple(((0, size),) if size else () for size in shape)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements.

    >>> row_major((4, 3, 2))
    (6, 2, 1)
    """
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
