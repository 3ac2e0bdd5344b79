"""A tensor assembled from boxes of stored tensors, and operations on it that touch no element."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

from attrs import evolve, frozen

from ...specs.stored import Box, Part


@frozen
class Assembly:
    """A tensor as boxes of stored tensors.

    Args:
        shape: Its shape.
        parts: The boxes; together they cover the tensor, each element once.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Assembly:
        """Assemble parts into the smallest tensor that contains them.

        Raises:
            ValueError: If the parts leave a gap, or overlap.
        """
        ends = zip(*([start + size for start, size in zip(p.at, p.shape, strict=True)] for p in parts), strict=True)
        shape = tuple(max(axis) for axis in ends)
        if fault := miscovered(shape, parts):
            place, count = fault
            msg = f"element {list(place)} of {list(shape)} is in {count} of its {len(parts)} parts"
            raise ValueError(msg)
        return cls(shape, tuple(parts))

    @property
    def keys(self) -> tuple[str, ...]:
        """Distinct keys of the stored tensors."""
        return tuple(dict.fromkeys(part.stored.key for part in self.parts))


def concatenated(tensors: Sequence[Assembly], axis: int) -> Assembly:
    """Concatenate tensors along an axis, as ``torch.cat`` does.

    Raises:
        ValueError: If their sizes differ along another axis.
    """
    first = tensors[0].shape
    axis = _axis(axis, len(first))
    parts: list[Part] = []
    length = 0
    for tensor in tensors:
        if len(tensor.shape) != len(first) or _without(tensor.shape, axis) != _without(first, axis):
            msg = f"tensors of {list(first)} and {list(tensor.shape)} cannot be joined along axis {axis}"
            raise ValueError(msg)
        parts += [evolve(part, at=_changed(part.at, axis, part.at[axis] + length)) for part in tensor.parts]
        length += tensor.shape[axis]
    return Assembly(_changed(first, axis, length), tuple(parts))


def stacked(tensors: Sequence[Assembly], axis: int) -> Assembly:
    """Stack tensors along a new axis, as ``torch.stack`` does.

    Raises:
        ValueError: If their shapes differ.
    """
    first = tensors[0].shape
    axis = _axis(axis, len(first) + 1)
    parts: list[Part] = []
    for place, tensor in enumerate(tensors):
        if tensor.shape != first:
            msg = f"tensors of {list(first)} and {list(tensor.shape)} cannot be stacked"
            raise ValueError(msg)
        parts += [
            evolve(part, at=_inserted(part.at, axis, place), axes=_inserted(part.axes, axis, -1)) for part in tensor.parts
        ]
    return Assembly(_inserted(first, axis, len(tensors)), tuple(parts))


def narrowed(tensor: Assembly, axis: int, start: int, stop: int) -> Assembly:
    """Narrow an axis to its entries from ``start`` to ``stop``.

    >>> from ...specs.stored import StoredTensor
    >>> rows = narrowed(Assembly.of([Part.whole(StoredTensor("f", "qkv", 0, (6, 4), "float32"))]), 0, 2, 4)
    >>> rows.shape, rows.parts[0].box
    ((2, 4), ((2, 4), (0, 4)))
    """
    axis = _axis(axis, len(tensor.shape))
    parts: list[Part] = []
    for part in tensor.parts:
        at = part.at[axis]
        low, high = max(start, at), min(stop, at + part.shape[axis])
        if low >= high:
            continue
        box, of = list(part.box), part.axes[axis]
        if of >= 0:
            box[of] = (box[of][0] + low - at, box[of][0] + high - at)
        parts.append(evolve(part, box=tuple(box), at=_changed(part.at, axis, low - start)))
    return Assembly(_changed(tensor.shape, axis, stop - start), tuple(parts))


def squeezed(tensor: Assembly, axis: int) -> Assembly:
    """Remove an axis of size 1; the stored axis behind it drops out of a part's ``axes``, and has size 1 in its box."""
    axis = _axis(axis, len(tensor.shape))
    assert tensor.shape[axis] == 1, f"axis {axis} of {tensor.shape} is not of size 1"
    parts = tuple(evolve(part, at=_without(part.at, axis), axes=_without(part.axes, axis)) for part in tensor.parts)
    return Assembly(_without(tensor.shape, axis), parts)


def transposed(tensor: Assembly, axis: int, other: int) -> Assembly:
    """Exchange two axes."""
    axis, other = _axis(axis, len(tensor.shape)), _axis(other, len(tensor.shape))
    parts = tuple(
        evolve(part, at=_exchanged(part.at, axis, other), axes=_exchanged(part.axes, axis, other)) for part in tensor.parts
    )
    return Assembly(_exchanged(tensor.shape, axis, other), parts)


def miscovered(shape: Sequence[int], parts: Iterable[Part]) -> tuple[tuple[int, ...], int] | None:
    """Find an element that is not in exactly one part, and the number of parts it is in; None if there is none."""
    boxes = [
        tuple((at, at + size) for at, size in zip(part.at, part.shape, strict=True)) for part in parts if prod(part.shape)
    ]
    return miscovered_by_boxes(shape, boxes)


def miscovered_by_boxes(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[tuple[int, ...], int] | None:
    """Find an element that is not in exactly one box, and the number of boxes it is in; None if there is none.

    The ends of the boxes cut the first axis into intervals; the boxes over each interval are checked along the next axis.

    >>> miscovered_by_boxes((4, 2), [((0, 2), (0, 2)), ((3, 4), (0, 2))])
    ((2, 0), 0)
    """
    return None if 0 in shape else _miscovered(tuple(shape), list(boxes))


def _miscovered(shape: tuple[int, ...], boxes: list[tuple[tuple[int, int], ...]]) -> tuple[tuple[int, ...], int] | None:
    if not shape or len(boxes) == 0:
        return None if len(boxes) == 1 else ((0,) * len(shape), len(boxes))
    if len(boxes) == 1 and all(box == (0, size) for box, size in zip(boxes[0], shape, strict=True)):
        return None
    cuts = sorted({0, shape[0], *(cut for box in boxes for cut in box[0])})
    over: list[list[tuple[tuple[int, int], ...]]] = [[] for _ in cuts]
    for (start, stop), *rest in boxes:
        for place in range(bisect_left(cuts, start), bisect_left(cuts, stop)):
            over[place].append(tuple(rest))
    for (start, _), rests in zip(pairwise(cuts), over, strict=False):
        if fault := _miscovered(shape[1:], rests):
            return (start, *fault[0]), fault[1]
    return None


def _axis(axis: int, num_axes: int) -> int:
    if not -num_axes <= axis < num_axes:
        msg = f"there is no axis {axis} in {num_axes} axes"
        raise ValueError(msg)
    return axis % num_axes


def _changed(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def _inserted(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis:])


def _without(values: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*values[:axis], *values[axis + 1 :])


def _exchanged(values: tuple[int, ...], axis: int, other: int) -> tuple[int, ...]:
    found = list(values)
    found[axis], found[other] = found[other], found[axis]
    return tuple(found)
