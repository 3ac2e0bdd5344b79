"""What ranks hold of an operator's results, from what they hold of its operands and the rule for its axes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from attrs import evolve

from .axes import (
    Axes,
    Axis,
    holders,
    local_size,
    meet,
    padding,
    parts_in,
    repeat_each,
    size_of,
    whole,
)
from .held import Held, Kind, is_all
from .moves import alike, joined, moved
from .paired_call import Call, Misuse, counted_twice
from .relation import Filled, Joined, Label, Relation, Reshaped


def relate(call: Call) -> tuple[Held, ...] | Misuse:
    """Return what ranks hold of the results of a call, or why they are not parts of what the whole model computes."""
    found = _mixed_rows(call) or _related(call)
    if isinstance(found, Misuse):
        return found
    for held, shape, local in zip(found, call.shapes, call.local_shapes, strict=True):
        if held.kind != "unknown" and (held.shape, held.local_shape(call.rank)) != (shape, local):
            cause = f"{call.name} makes {list(local)} on a rank of what is {list(shape)} in the whole model"
            return Misuse(f"{cause}, and its operands are shared out otherwise")
    return found


def _mixed_rows(call: Call) -> Misuse | None:
    """Return why an operator cannot have rows that other ranks set to zero later: each row is to be worked on alone."""
    unmasked = [number for number, held in enumerate(call.operands) if held.unmasked]
    if not unmasked:
        return None
    first, rule = unmasked[0], call.rule
    num, shape = call.operands[first].unmasked, call.operands[first].shape
    is_alone = all(held.unmasked == num or held.is_plain for held in call.operands) and all(
        made[:num] == shape[:num] for made in call.shapes
    )
    if isinstance(rule, Relation):
        rows = rule.operands[first][:num]
        together = {*rule.whole, *rule.summed, *rule.averaged}
        is_alone = is_alone and all(labels[:num] == rows for labels in rule.results) and not together.intersection(rows)
        is_alone = is_alone and all(rule.operands[number][:num] == rows for number in unmasked)
    elif isinstance(rule, Joined):
        is_alone = is_alone and rule.axis % len(shape) >= num
    elif not isinstance(rule, Reshaped):
        is_alone = is_alone and all(len(made) == len(shape) for made in call.shapes)
    return None if is_alone else Misuse("rows of other ranks are not set to zero yet", first, "whole")


def _related(call: Call) -> tuple[Held, ...] | Misuse:
    match call.rule:
        case Filled():
            return tuple(alike(shape, local) for shape, local in zip(call.shapes, call.local_shapes, strict=True))
        case Relation():
            return _by_labels(call, call.rule)
        case Joined(axis):
            return joined(call, axis)
        case _:
            return moved(call)


def _by_labels(call: Call, rule: Relation) -> tuple[Held, ...] | Misuse:
    call = _with_shares(_with_repeats(call, rule), rule)
    layout = _labelled(call, rule)
    if isinstance(layout, Misuse):
        return layout
    summed = [label for label in (*rule.summed, *rule.averaged) if label in layout and not is_all(layout[label])]
    split = [label for label, axis in layout.items() if parts_in(axis) is not None and label not in summed]
    summands = [number for number, held in enumerate(call.operands) if held.kind == "summand" and not held.unmasked]
    wrong = _not_whole(call, rule, layout)
    if len(split) + len(summed) > 1:
        wrong = Misuse("two axes are shared out over the same ranks: of their products, each rank has some", 0, "whole")
    scale = _scale(call, rule)
    wrong = wrong or (scale if isinstance(scale, Misuse) else _wrong_due(call, rule, summands, summed, split))
    times = _sum_of(call, rule, summed[0], layout[summed[0]]) if summed else Fraction(1)
    if wrong is not None:
        return wrong
    if isinstance(times, Misuse):
        return times
    assert not isinstance(scale, Misuse), "it is among what is wrong"
    is_unmasked = any(held.unmasked for held in call.operands)
    kind = "summand" if summed or summands or is_unmasked else "parts" if split else "whole"
    return tuple(
        _result(
            call, tuple(layout.get(label, whole(n)) for label, n in zip(labels, shape, strict=True)), kind, scale * times
        )
        for labels, shape in zip(rule.results, call.shapes, strict=True)
    )


def _not_whole(call: Call, rule: Relation, layout: Mapping[Label, Axis]) -> Misuse | None:
    for label, reason in rule.whole.items():
        if label in layout and not is_all(layout[label]):
            return Misuse(reason, _with_label(call, rule, label), "whole")
    return None


def _result(call: Call, axes: Axes, kind: Kind, scale: Fraction) -> Held:
    own = "whole" if kind == "parts" and not any(parts_in(axis) for axis in axes) else kind
    return Held(
        own,
        axes,
        scale,
        unmasked=max((held.unmasked for held in call.operands), default=0),
        origin=next((held.origin for held in call.operands if held.origin), ""),
        is_drawn=any(held.is_drawn for held in call.operands) and own != "parts",
        padding=_padded(call, axes),
    )


def _with_shares(call: Call, rule: Relation) -> Call:
    """Return the call with whole operands that were divided by the number of ranks as the summands that they are."""
    is_sum = bool(rule.summed) and any(held.kind == "parts" for held in call.operands)
    if not is_sum and not any(held.kind == "summand" for held in call.operands):
        return call
    share = Fraction(1, call.num_ranks)
    operands = tuple(
        evolve(held, kind="summand", scale=Fraction(1)) if held.kind == "whole" and held.scale == share else held
        for held in call.operands
    )
    return evolve(call, operands=operands)


def _with_repeats(call: Call, rule: Relation) -> Call:
    """Return the call with the operands whose entries the operator repeats as they are after that."""
    local = {} if not isinstance(call.local_rule, Relation) else dict(call.local_rule.repeated)
    operands = list(call.operands)
    for number, how in rule.repeated:
        held = operands[number]
        num = local[number].num if number in local else _times(call, rule, number, how.axis)
        axes = tuple(repeat_each(a, how.num, num) if at == how.axis else a for at, a in enumerate(held.axes))
        operands[number] = evolve(held, axes=axes)
    return evolve(call, operands=tuple(operands))


def _times(call: Call, rule: Relation, number: int, axis: int) -> int:
    """Return how often a rank uses each entry of an operand's axis, where its own call does not say so."""
    label, own = rule.operands[number][axis], local_size(call.operands[number].axes[axis], call.rank)
    repeated = {other for other, _ in rule.repeated}
    for other, labels in enumerate(rule.operands):
        if label in labels and other not in repeated:
            return max(1, local_size(call.operands[other].axes[labels.index(label)], call.rank) // max(own, 1))
    return 1


def _padded(call: Call, axes: Axes) -> Any:
    if not any(padding(axis) for axis in axes):
        return ""
    if call.name == "exp" and call.operands[0].padding == "lowest":
        return "zero"
    if call.name in _KEEPING_ZERO and all(held.padding in {"", "zero"} for held in call.operands):
        return "zero"
    return "any"


_KEEPING_ZERO = frozenset({"mul", "relu", "neg", "linear", "mm", "addmm", "matmul", "_to_copy", "gelu", "tanh"})
"""Operators that give zero for zero."""


def _labelled(call: Call, rule: Relation) -> dict[Label, Axis] | Misuse:
    """Return how the axis of each label is shared out."""
    found: dict[Label, Axis] = {}
    for number, (held, labels) in enumerate(zip(call.operands, rule.operands, strict=True)):
        for axis, label in zip(held.axes, labels, strict=True):
            if not label:
                if not is_all(axis):
                    return Misuse(f"{call.name} needs an axis whole of which each rank has some entries", number, "whole")
            elif label not in found:
                found[label] = axis
            else:
                met = meet(found[label], axis)
                if met is None:
                    return Misuse(_other_order(call, found[label], axis), number)
                found[label] = met
    drawn = any(held.is_drawn for held in call.operands)
    if drawn and any(parts_in(axis) is not None and holders(axis) == "repeated" for axis in found.values()):
        return Misuse("ranks that hold the same entries draw other random numbers for them")
    return found


def _other_order(call: Call, first: Axis, second: Axis) -> str:
    mine, others = (f"{local_size(axis, call.rank)} of {size_of(axis)} entries" for axis in (first, second))
    if mine != others:
        return f"{call.name} brings {mine} together with {others}"
    return f"{call.name} brings entries together that are other ones on the ranks: the two are shared out in other ways"


def _with_label(call: Call, rule: Relation, label: Label) -> int:
    return next(
        (
            number
            for number, (held, labels) in enumerate(zip(call.operands, rule.operands, strict=True))
            if any(name == label and not is_all(axis) for name, axis in zip(labels, held.axes, strict=True))
        ),
        0,
    )


def _scale(call: Call, rule: Relation) -> Fraction | Misuse:
    """Return the multiple of the results, from the multiples of the operands."""
    scaled = [number for number, held in enumerate(call.operands) if held.scale != 1]
    total = Fraction(1)
    while scaled:
        number = scaled[0]
        scale = call.operands[number].scale
        together = next(
            (
                group
                for group in rule.linear
                if number in group and all(call.operands[n].scale == scale or call.operands[n].fill == 0 for n in group)
            ),
            None,
        )
        if together is None:
            return Misuse(_multiple(call.operands[number]), number, path=call.operands[number].origin or None)
        total *= scale
        scaled = [n for n in scaled if n not in together]
    return total


def _multiple(held: Held) -> str:
    return f"it is {held.scale} times what the whole model has, since {held.origin or 'a synchronisation'} adds equal values"


def _wrong_due(call: Call, rule: Relation, summands: list[int], summed: list[Label], split: list[Label]) -> Misuse | None:
    """Return why operands that are not complete yet cannot be used so."""
    for number, held in enumerate(call.operands):
        if held.lacks:
            return Misuse(f"the bias of {', '.join(sorted(held.lacks))} is not added yet", number, "whole")
    wrong = _wrong_summands(call, rule, summands, is_split=bool(split)) if summands else None
    return wrong or (_wrong_sum(call, rule, summands, summed[0]) if summed else None)


def _wrong_summands(call: Call, rule: Relation, summands: list[int], *, is_split: bool) -> Misuse | None:
    """Return why an operator does not give summands for summands."""
    joint = [group for group in rule.linear if set(summands) <= group]
    if not joint:
        return Misuse(f"{call.name} is not linear in what is still to be summed over ranks", summands[0], "whole")
    if is_split:
        return Misuse(f"{call.name} brings parts and summands together", summands[0], "whole")
    alone = [[number for number in group if not _is_summand(call.operands[number])] for group in joint]
    return counted_twice(call, alone[0][0]) if all(alone) else None


def _wrong_sum(call: Call, rule: Relation, summands: list[int], label: Label) -> Misuse | None:
    """Return why a sum over the parts of an axis does not give summands."""
    members = {number for number, labels in enumerate(rule.operands) if label in labels}
    beside = {number for group in rule.linear if group & members for number in group - members}
    for number in sorted(beside):
        if not _is_summand(call.operands[number]):
            return counted_twice(call, number)
    if members & set(summands):
        return Misuse(f"{call.name} sums over parts of what is still to be summed over ranks", summands[0], "whole")
    return None


def _is_summand(held: Held) -> bool:
    return held.kind == "summand" or held.fill == 0


def _sum_of(call: Call, rule: Relation, label: Label, axis: Axis) -> Fraction | Misuse:
    """Return the multiple of the sum that summands over an axis add up to."""
    number, parts = _with_label(call, rule, label), parts_in(axis)
    padded = [held for held in call.operands if padding_in(held)]
    cause = ""
    if parts is None:
        told = f"{local_size(axis, call.rank)} entries where the whole model counts {size_of(axis)}"
        cause = f"{call.name} counts {told}"
    elif holders(axis) == "repeated":
        cause = f"{call.name} sums over entries that several ranks hold: they are counted more than once"
    elif padded and not any(held.padding == "zero" for held in padded):
        cause = f"{call.name} sums over entries that are padding"
    elif label in rule.averaged and len({len(held) for held in parts.held}) > 1:
        cause = f"{call.name} takes the mean over other numbers of entries on the ranks"
    if cause:
        is_padding = cause.endswith("padding")
        return Misuse(cause, number, "whole", next(held.origin for held in padded) if is_padding else None)
    return Fraction(call.num_ranks if label in rule.averaged else 1)


def padding_in(held: Held) -> bool:
    """Tell whether a value has entries that are padding."""
    return any(padding(axis) for axis in held.axes)
