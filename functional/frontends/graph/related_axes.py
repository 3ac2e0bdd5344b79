"""The axes of an operator's results in factors of its operands' axes, and the factors that it keeps from being split.

What operators do stands in the table of rules that checking a schedule shares: ``types/rules``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...types.relation import (
    Filled,
    Joined,
    Label,
    OperatorCall,
    Relation,
    RepeatedEach,
    Reshaped,
    Rule,
    Shape,
    Strided,
    Taken,
    Tiled,
    Widened,
)
from ...types.rules import rule_of
from .factors import Axis, Factor, block, laid_out, part, reshape, size_of, unify, unsplittable

Axes = tuple[Axis, ...]
"""The axes of a tensor."""

_SUMMED = "they are summed over within the model's own code"
_AVERAGED = "the mean is taken over them"
_PICKING = frozenset({"select", "unbind", "select_copy", "unbind_copy"})
"""Operators that pick single entries of an axis, as q, k and v of a joint axis: what lies within may be split."""


def related_axes(call: OperatorCall, operands: Sequence[Axes], *, sums_parts: bool = False) -> Sequence[Axes]:
    """Return the axes of a call's results, and note in the factors of its operands what they cannot be, and why.

    Args:
        call: The call.
        operands: The axes of its operands.
        sums_parts: Whether an axis that it sums over may be split, as the sums of the ranks are added up.
    """
    rule = rule_of(call)
    made = _made(call, rule, operands, sums_parts=sums_parts) if rule is not None else []
    if [tuple(map(size_of, axes)) for axes in made] == list(call.shapes):
        return made
    for axes in operands:
        _block_all(axes, f"{call.name} works on them")
    return [tuple(_new(call, size) for size in shape) for shape in call.shapes]


def _made(call: OperatorCall, rule: Rule, operands: Sequence[Axes], *, sums_parts: bool) -> list[Axes]:
    match rule:
        case Relation():
            return _by_labels(call, rule, operands, sums_parts=sums_parts)
        case Filled():
            return [_filled(call, shape, operands) for shape in call.shapes]
        case Joined(axis):
            return [_joined(operands, axis, call.shapes[0])]
        case Taken(axis, ranges):
            return [_with_axis(operands[0], axis, _taken(operands[0][axis], *bounds)) for bounds in ranges]
        case _:
            return [_moved(rule, operands[0], call.shapes[0])]


def _moved(rule: Reshaped | Strided | Widened | Tiled | RepeatedEach, axes: Axes, shape: Shape) -> Axes:
    """Return the axes after an operator that moves the entries of one operand."""
    old = (*((),) * (len(shape) - len(axes)), *axes)
    match rule:
        case Reshaped():
            return tuple(reshape(axes, shape))
        case Strided(at):
            return _with_axis(axes, at, _strided(axes[at], shape[at]))
        case Widened():
            return tuple(axis if size_of(axis) == n else _free(n) for axis, n in zip(old, shape, strict=True))
        case Tiled(repeats):
            return tuple((*_free(num), *axis) for axis, num in zip(old, repeats, strict=True))
        case RepeatedEach(at, num):
            return _with_axis(axes, at, (*axes[at], *_free(num)))


def _by_labels(call: OperatorCall, rule: Relation, operands: Sequence[Axes], *, sums_parts: bool) -> list[Axes]:
    each = {number: (how.axis, how.num) for number, how in rule.repeated}
    found: dict[Label, Axis] = {}
    for number, (axes, labels) in enumerate(zip(operands, rule.operands, strict=True)):
        for at, (own, label) in enumerate(zip(axes, labels, strict=True)):
            axis = (*own, *_free(each[number][1])) if number in each and at == each[number][0] else own
            if not label:
                block(axis, f"{call.name} works on them")
            elif size_of(axis) != 1:
                unify(found.setdefault(label, axis), axis)
    for label, reason in rule.whole.items():
        block(found.get(label, ()), reason, is_picked=call.name in _PICKING)
    for label in () if sums_parts else rule.summed:
        block(found.get(label, ()), _SUMMED)
    for label in rule.averaged:
        block(found.get(label, ()), _AVERAGED)
    return [
        tuple(found[label] if label in found else _new(call, size) for label, size in zip(labels, shape, strict=True))
        for labels, shape in zip(rule.results, call.shapes, strict=True)
    ]


def _filled(call: OperatorCall, shape: Shape, operands: Sequence[Axes]) -> Axes:
    """Return the axes of new memory: those of the tensor that it is made like, else any."""
    if call.name.endswith("_like") and operands:
        return operands[0]
    return tuple(map(_free, shape))


def _joined(operands: Sequence[Axes], at: int, shape: Shape) -> Axes:
    joined = [axes for axes in operands if len(axes) == len(shape)]  # empty tensors may have another rank
    made: list[Axis] = []
    for axis in range(len(shape)):
        present = [axes[axis] for axes in joined if size_of(axes[axis])]
        if axis == at:
            made.append(laid_out(present) if present else unsplittable(0, "it is empty"))
        else:
            for other in present[1:]:
                unify(present[0], other)
            made.append(present[0] if present else unsplittable(0, "it is empty"))
    return tuple(made)


def _taken(axis: Axis, start: int, stop: int) -> Axis:
    return part(axis, start, stop) if start < stop else unsplittable(0, "it is empty")


def _strided(axis: Axis, size: int) -> Axis:
    block(axis, "every so many of them are taken")
    return unsplittable(size, "it is a part of something whole")


def _with_axis(axes: Axes, at: int, axis: Axis) -> Axes:
    return (*axes[:at], axis, *axes[at + 1 :])


def _free(size: int) -> Axis:
    """Return an axis of which nothing is known but its size."""
    return (Factor(size),) if size != 1 else ()


def _new(call: OperatorCall, size: int) -> Axis:
    return unsplittable(size, f"{call.name} makes it whole")


def _block_all(axes: Iterable[Axis], reason: str) -> None:
    for axis in axes:
        block(axis, reason)
