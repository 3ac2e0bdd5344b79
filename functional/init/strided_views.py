"""Views of a tensor as boxes: which indices of which axes a strided view covers."""

from __future__ import annotations

from ...specs.index import row_major
from ...specs.program import Box


def box_of(shape: tuple[int, ...], offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Box | None:
    """Return the part of a contiguous tensor that a view of it covers, None if that is no box (a diagonal, say).

    A row, a slice, every other column, a transpose, and what reshaping gives of them are boxes.

    Args:
        shape: Shape of the whole tensor.
        offset: First element of the view.
        sizes: Shape of the view.
        strides: Its strides, in elements.

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
    taken: dict[int, tuple[int, int]] = {}  # by axis: how many indices, and the step between them
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
    """Return the shape of a part.

    >>> box_shape((10, 4), ((0, 10, 3), None))
    (4, 4)
    """
    if box is None:
        return shape
    return tuple(size if i is None else len(range(*i)) for size, i in zip(shape, box, strict=True))
