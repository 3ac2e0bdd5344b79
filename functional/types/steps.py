"""What ranks hold behind the calls of layout steps: collectives, rows of their own, biases and masks."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any, get_args

from attrs import evolve

from ...specs.layout_steps import (
    AddBiasAfterSync,
    Gives,
    LayoutStep,
    MaskPadding,
    SumGradient,
    SumProducts,
    Sync,
    SyncOp,
    VocabParallel,
)
from .axes import Axis, Parts, Whole, canonical, local_size, padding, parts_in, size_of, whole
from .held import UNKNOWN, Held, lost, whole_of
from .paired_call import Misuse
from .relation import Shape
from .tape import RecordedCall

_ROWS = Held("rows")
"""Numbers of rows or entries that each rank counts for itself."""


def after_step(  # noqa: PLR0911  a return for each step
    call: RecordedCall, step: LayoutStep, operands: tuple[Held, ...], num: int
) -> Held | Misuse:
    """Return what ranks hold of the result of a call that a layout step's own code runs.

    Args:
        call: The call.
        step: The layout step.
        operands: What ranks hold of its operands.
        num: Ranks along ``tensor``.
    """
    match step:
        case Sync(mesh_axis=mesh_axis) | SumGradient(mesh_axis=mesh_axis) if mesh_axis != "tensor":
            each = f"ranks along {mesh_axis} have samples of their own"
            return Misuse(f"{each}, and {step} brings together what they compute of them")
        case Sync(op=op) if op not in get_args(SyncOp):
            return _given(step, operands, num)
        case Sync(op="divide") if operands[0].unmasked:
            return Misuse("it divides rows of which those of other ranks are not zero yet")
        case Sync(op="divide"):
            return evolve(operands[0], scale=operands[0].scale / num, origin=step.module)
        case Sync() | SumGradient() | SumProducts():
            return _collective(call, operands, num, step.module)
        case VocabParallel():
            return _own_rows(call, operands)
        case AddBiasAfterSync():
            return _with_bias(operands, step.module)
        case MaskPadding():
            return _masked(call, step, operands)
        case _:
            return UNKNOWN


def unsaid(step: Sync) -> str:
    """Return why nobody can follow a function of the user's own that synchronises."""
    return f"nobody says what {step.op} gives: sync(..., gives='whole')"


def _given(step: Sync, operands: tuple[Held, ...], num: int) -> Held | Misuse:
    """Return what the user says that a function of theirs gives."""
    if not operands or operands[0].kind == "unknown":
        return UNKNOWN
    if step.gives is None:
        return lost(unsaid(step))
    if operands[0].unmasked:
        return Misuse("it takes rows of which those of other ranks are not zero yet")
    if step.when in {"backward_pre", "backward_post"}:  # said of the gradient
        return operands[0]
    return given(step.gives, step.axis, operands[0].shape, num)


def given(gives: Gives, axis: int | None, shape: Shape, num: int) -> Held:
    """Return what ranks hold of a value of which the user says it.

    Args:
        gives: What it is.
        axis: The axis that is split into equal parts, for ``split``.
        shape: Its shape in the whole model.
        num: Ranks along ``tensor``.
    """
    if gives == "split" and axis is not None and shape:
        at = axis % len(shape)
        return _cut(whole_of(shape), at, num) if shape[at] % num == 0 else UNKNOWN
    return evolve(whole_of(shape), kind="summand" if gives == "summand" else "whole")


def _collective(call: RecordedCall, operands: tuple[Held, ...], num: int, module: str) -> Held | Misuse:  # noqa: PLR0911  an operator each
    if not operands:
        return UNKNOWN
    held, name = operands[0], call.name.removeprefix("shardplan::")
    if held.kind == "unknown":
        return held
    if held.unmasked or held.is_drawn:
        drawn = "random numbers that each rank has drawn for itself"
        return Misuse(f"{name} takes {drawn if held.is_drawn else 'rows of which those of other ranks are not zero yet'}")
    match name:
        case "sum_gradient" | "sum_gradient_of" | "average_gradient":
            return held
        case "all_reduce":
            return _summed(held, num, module)
        case "all_gather" | "gather_sum":
            return _gathered(held, call.arguments, name)
        case "reduce_scatter":
            summed = _summed(held, num, module)
            return summed if isinstance(summed, Misuse) else _cut(summed, call.arguments["axis"], num)
        case "split":
            if held.kind != "whole":
                return Misuse(f"it keeps a part of {_kind(held)}, and takes it for a whole value")
            return _cut(held, call.arguments["axis"], num, call.arguments["part"])
        case _:  # the parts of a tensor whose gradient is summed over neighbours, cut and joined again
            return held


def _kind(held: Held) -> str:
    return {"parts": "what each rank has a part of", "summand": "what is to be summed", "whole": "a whole value"}[held.kind]


def _summed(held: Held, num: int, module: str) -> Held | Misuse:
    match held.kind:
        case "parts":
            return Misuse("the sum adds parts, which are other entries on each rank", 0, "summand")
        case "summand":
            return evolve(held, kind="whole")
        case _:
            return evolve(held, scale=held.scale * num, origin=module)


def _gathered(held: Held, arguments: Any, name: str) -> Held | Misuse:
    at = arguments["axis"]
    if held.kind != "parts" or held.split_axis != at:
        where = f"axis {held.split_axis} is shared out" if held.kind == "parts" else f"it is {_kind(held)}"
        return Misuse(f"{name} joins axis {at}, and {where}", 0, "parts")
    axis = canonical(held.axes[at])
    size, part = size_of(axis), arguments.get("part", local_size(axis))
    if not _are_in_order(axis, part) or arguments.get("size", size) != size:
        return Misuse(f"{name} joins axis {at} in the order of ranks, and the parts are not in that order")
    axes = tuple(whole(size) if n == at else other for n, other in enumerate(held.axes))
    return evolve(held, kind="whole", axes=axes, padding="")


def _are_in_order(axis: Any, part: int) -> bool:
    """Tell whether the parts of all ranks, each with ``part`` entries, are the axis one after another."""
    first, *inner = axis
    if not isinstance(first, Parts):
        return False
    unit = 1
    for factor in inner:
        unit *= factor.size
    if part % unit:
        return False
    each = part // unit
    return (
        all(
            entry == rank * each + at
            for rank, entries in enumerate(first.held)
            for at, entry in enumerate(entries)
            if entry < first.size
        )
        and sum(entry < first.size for entries in first.held for entry in entries) == first.size
    )


def _cut(held: Held, at: int, num: int, part: int | None = None) -> Held:
    axis = held.axes[at]
    size = size_of(axis)
    each = part or size // num
    if each * num == size:
        made = canonical([Parts(num, tuple((rank,) for rank in range(num))), Whole(each)])
    else:
        starts = [min(rank * each, size) for rank in range(num + 1)]
        made = canonical([Parts(size, tuple(tuple(range(a, b)) for a, b in pairwise(starts)))])
    return evolve(held, kind="parts", axes=tuple(made if n == at else other for n, other in enumerate(held.axes)))


def _own_rows(call: RecordedCall, operands: tuple[Held, ...]) -> Held | Misuse:
    """Follow the calls around an embedding that looks up the rows that each rank has."""
    if any(held.kind == "unknown" for held in operands):
        return UNKNOWN
    match call.name, operands:
        case "masked_fill", (held, *_) if held.unmasked == len(held.axes) - 1:
            return evolve(held, unmasked=0, origin="")
        case "masked_fill", (held, *_) if held.unmasked:
            return Misuse("rows of other ranks are set to zero as if tokens were counted by all axes but the last", 0)
        case "where", (_, held, *_) if held.unmasked:  # the row of the padding token is not trained
            return held
        case "detach" | "clone", (held,):
            return held
        case _:
            return _ROWS


def _with_bias(operands: tuple[Held, ...], module: str) -> Held | Misuse:
    held, bias = operands
    if held.kind == "unknown":
        return held
    if held.kind == "summand" or held.scale != 1:
        return Misuse(f"{module} adds its bias before its outputs are summed: each rank adds it", 0, "whole")
    if not bias.is_plain:
        return Misuse(f"{module} adds its bias to whole outputs, and each rank has a part of it", 1, "whole")
    return evolve(held, lacks=frozenset(), origin="")


def _masked(call: RecordedCall, step: MaskPadding, operands: tuple[Held, ...]) -> Held | Misuse:
    if call.name != "masked_fill":
        return _ROWS
    held = operands[0]
    if held.kind == "unknown":
        return held
    axis = held.axes[-1]
    if held.kind != "parts" or parts_in(axis) is None or (local_size(axis), size_of(axis)) != step.sizes:
        part, size = step.sizes
        return Misuse(
            f"it masks what lies past entry {size} of parts of {part}, and it has {local_size(axis)} of {size_of(axis)}"
        )
    return evolve(held, padding="lowest") if padding(axis) else held


def are_rows(axis: Axis, num_rows: int) -> bool:
    """Tell whether each rank has consecutive rows, the n-th rank from row n times ``num_rows``."""
    first, *inner = axis
    unit = prod(factor.size for factor in inner)
    if not isinstance(first, Parts) or num_rows % unit:
        return False
    each = num_rows // unit
    return all(
        entry in {rank * each + at, *range(first.size, entry + 1)}
        for rank, entries in enumerate(first.held)
        for at, entry in enumerate(entries)
    )
