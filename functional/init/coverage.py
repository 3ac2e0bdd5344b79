"""Which elements of a storage some strided views cover."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from ...specs.index import row_major

View = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A part of a storage: offset, shape and stride, in elements."""


def whole_view(shape: tuple[int, ...]) -> View:
    """Return the view that is a whole contiguous tensor."""
    return (0, shape, row_major(shape))


def num_covered(views: Iterable[View], num_elements: int) -> int:
    """Return how many elements of a storage are in at least one of some views.

    >>> num_covered([(0, (9,), (1,)), (0, (1,), (1,))], num_elements=10)
    9
    """
    distinct = set(views)
    if any(prod(shape) >= num_elements for _, shape, _ in distinct):
        return num_elements
    mask = np.zeros(num_elements, dtype=bool)
    for offset, shape, stride in distinct:
        np.lib.stride_tricks.as_strided(mask[offset:], shape, stride)[...] = True  # an element of the mask is one byte
    return int(mask.sum())
