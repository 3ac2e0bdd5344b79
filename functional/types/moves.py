"""What ranks hold of entries that an operator moves, or repeats, or lays one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import evolve

from .axes import (
    Alike,
    Axes,
    Axis,
    canonical,
    is_product,
    join,
    local_size,
    meet,
    parts_in,
    repeat_each,
    reshape,
    size_of,
    take,
    tile,
    whole,
)
from .held import Held, is_all
from .paired_call import Call, Misuse, counted_twice
from .relation import RepeatedEach, Reshaped, Shape, Strided, Taken, Tiled, Widened


def alike(shape: Shape, local: Shape) -> Held:
    """Return the type of a tensor in which all entries are equal."""
    pairs = zip(shape, local, strict=True)
    return Held("whole", tuple(whole(n) if n == m else canonical([Alike(n, m)]) for n, m in pairs))


def moved(call: Call) -> tuple[Held, ...] | Misuse:
    """Follow an operator that moves the entries of one operand."""
    held = call.operands[0]
    if held.lacks and (not isinstance(call.rule, Reshaped) or call.shapes[0][-1] != held.shape[-1]):
        return Misuse("its bias is not added yet", 0, "whole")
    made: list[Held] = []
    for number, (shape, local) in enumerate(zip(call.shapes, call.local_shapes, strict=True)):
        axes = _moved_axes(call, held.axes, number, shape, local)
        if isinstance(axes, str):
            is_open = isinstance(call.rule, Reshaped) and is_product(held.axes, shape, local, call.rank)
            return Misuse(f"{axes}, or of two axes at once" if is_open else axes, is_open=is_open)
        made.append(evolve(held, axes=axes))
    return tuple(made)


def _moved_axes(call: Call, axes: Axes, number: int, shape: Shape, local: Shape) -> Axes | str:  # noqa: PLR0911  a rule each
    match call.rule, call.local_rule:
        case Reshaped(), _:
            return reshape(axes, shape, local, call.rank)
        case Taken(), _ if call.operands[0].fill is not None:
            return alike(shape, local).axes
        case Taken(axis, ranges), Taken(_, local_ranges):
            taken = take(axes[axis], *ranges[number], *local_ranges[number], call.rank)
            return taken if isinstance(taken, str) else (*axes[:axis], taken, *axes[axis + 1 :])
        case Strided(axis, _, step), Strided(_, _, _):
            each = _strided(axes[axis], step, call.rank)
            return each if isinstance(each, str) else (*axes[:axis], each, *axes[axis + 1 :])
        case Widened(), _:
            old = (*((),) * (len(shape) - len(axes)), *axes)
            return tuple(
                axis
                if size_of(axis) == n and local_size(axis, call.rank) == m
                else canonical([Alike(n, m)])
                if n != m
                else whole(n)
                for axis, n, m in zip(old, shape, local, strict=True)
            )
        case Tiled(repeats), Tiled(local_repeats):
            old = (*((),) * (len(repeats) - len(axes)), *axes)
            return tuple(_tiled(axis, n, m) for axis, n, m in zip(old, repeats, local_repeats, strict=True))
        case RepeatedEach(axis, num), RepeatedEach(_, local_num):
            return (*axes[:axis], repeat_each(axes[axis], num, local_num), *axes[axis + 1 :])
        case _:
            return f"{call.name} is another kind of operator at local sizes"


def _strided(axis: Axis, step: int, rank: int) -> Axis | str:
    """Return every so many entries of an axis: ranks have all or none of each group of so many."""
    size, local = size_of(axis), local_size(axis, rank)
    if is_all(axis):
        return whole(-(-size // step))
    if size % step or local % step:
        return f"every {step} entries are taken, and ranks have {local} of {size}"
    groups = reshape((axis,), (size // step, step), (local // step, step), rank)
    if isinstance(groups, str) or not is_all(groups[1]):
        return f"every {step} entries are taken, and they are shared out in other units"
    return groups[0]


def _tiled(axis: Axis, num: int, local: int) -> Axis:
    return tile(axis, num) if num == local else canonical([Alike(num, local), *axis])


def joined(call: Call, at: int) -> tuple[Held, ...] | Misuse:
    """Follow an operator that lays its operands one after another along an axis."""
    rank = len(call.shapes[0])
    operands = tuple(held for held in call.operands if len(held.axes) == rank or held.shape != (0,))
    kinds = {held.kind for held in operands if held.fill != 0}
    if "summand" in kinds and "whole" in kinds:
        return counted_twice(call, next(n for n, held in enumerate(operands) if held.kind == "whole" and held.fill != 0))
    if len({(held.scale, held.unmasked) for held in operands}) > 1 or any(held.lacks for held in operands):
        return Misuse("what is joined is not complete in the same way")
    made: list[Axis] = []
    for axis in range(rank):
        present = [held.axes[axis] for held in operands]
        if axis == at % rank:
            found = join(present)
        else:
            found = present[0]
            for other in present[1:]:
                met = meet(found, other)
                if met is None:
                    return Misuse(f"axis {axis} of what is joined is shared out in other ways")
                found = met
        if isinstance(found, str):
            return Misuse(found)
        made.append(found)
    kind = "summand" if "summand" in kinds else "parts" if any(parts_in(axis) for axis in made) else "whole"
    first = next((held for held in operands if held.kind == kind), operands[0])
    is_drawn = any(held.is_drawn for held in operands)
    return (evolve(first, kind=kind, axes=tuple(made), fill=None, is_drawn=is_drawn, padding=_worst(operands)),)


def _worst(operands: Sequence[Held]) -> Any:
    found = {held.padding for held in operands if held.padding}
    return found.pop() if len(found) == 1 else "any" if found else ""
