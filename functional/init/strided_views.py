"""Strided views: the box of a tensor that a view covers, and the elements that several views cover together."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from ...specs.index import row_major
from ...specs.program import Box

View = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A part of a storage: offset, shape and stride, in elements."""


def box_of(shape: tuple[int, ...], offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Box | None:
    """Return the box of a contiguous tensor that a view covers, None if it covers no box (a diagonal, say).

    A row, a slice, every second column, a transpose, and reshapes of them are boxes.

    Args:
        shape: Shape of the whole tensor.
        offset: First element of the view.
        sizes: Shape of the view.
        strides: Strides of the view, in elements.

    >>> box_of((10, 4), offset=8, sizes=(4,), strides=(1,))
    ((2, 3, 1), None)
    >>> box_of((10, 4), offset=0, sizes=(4, 10), strides=(1, 4))
    (None, None)
    >>> box_of((4, 4), offset=0, sizes=(4,), strides=(5,)) is None
    True
    """
    if 0 in sizes or 0 in shape:
        return (None,) * len(shape) if 0 in shape else None
    whole = row_major(shape)
    first: list[int] = []
    for stride in whole:
        at, offset = divmod(offset, stride)
        first.append(at)
    taken: dict[int, tuple[int, int]] = {}  # by axis: number of indices, and the step between them
    for dimension in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size > 1):
        stride, size = dimension
        while size > 1:
            axis = next((a for a, unit in enumerate(whole) if shape[a] > 1 and not stride % unit), None)
            if axis is None or stride == 0:
                return None
            count, step = taken.get(axis, (1, stride // whole[axis]))
            if stride != whole[axis] * step * count:
                return None
            if first[axis] + (count * size - 1) * step < shape[axis]:
                taken[axis] = count * size, step
                break
            left = shape[axis] // count  # the dimension goes on into the axes before
            if left == 1 or step != 1 or first[axis] or shape[axis] % count or size % left:
                return None
            taken[axis] = shape[axis], 1
            size //= left
            stride = whole[axis] * shape[axis]
    intervals = [(at, *taken.get(axis, (1, 1))) for axis, at in enumerate(first)]
    return tuple(
        None if count == size else (at, at + (count - 1) * step + 1, step)
        for (at, count, step), size in zip(intervals, shape, strict=True)
    )


def box_shape(shape: tuple[int, ...], box: Box | None) -> tuple[int, ...]:
    """Return the shape of a box.

    >>> box_shape((10, 4), ((0, 10, 3), None))
    (4, 4)
    """
    if box is None:
        return shape
    return tuple(size if i is None else len(range(*i)) for size, i in zip(shape, box, strict=True))


def whole_view(shape: tuple[int, ...]) -> View:
    """Return the view of a whole contiguous tensor."""
    return (0, shape, row_major(shape))


def num_covered(views: Iterable[View], num_elements: int) -> int:
    """Return the number of elements of a storage that at least one of the views covers.

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
