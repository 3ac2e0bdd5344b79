"""Operators that work on groups of channels: group norms and grouped convolutions, where ranks have whole groups."""

from __future__ import annotations

from attrs import evolve

from .axes import Axis, equal, local_size, parts_in, reshape, size_of, whole
from .held import Held, is_all
from .paired_call import Call, Misuse

GROUPS = {"group_norm": "num_groups", "native_group_norm": "group", "convolution": "groups", "_convolution": "groups"}
"""Operators by name, and the argument that is the number of groups."""


def relate_groups(call: Call, num: int, local_num: int) -> tuple[Held, ...] | Misuse:
    """Return what ranks hold of the results of an operator on groups, each of which a rank has entirely.

    Args:
        call: The call; the first operand has its channels along axis 1.
        num: Groups in the whole model.
        local_num: Groups on the rank.
    """
    x, *rest = call.operands
    channels = _by_group(x.axes[1], num, local_num, call)
    if isinstance(channels, Misuse):
        return channels
    others = [axis for at, axis in enumerate(x.axes) if at != 1]
    if not all(map(is_all, others)) or any(held.kind == "summand" or held.is_due for held in call.operands):
        return Misuse(f"{call.name} needs whole channels", 0, "whole")
    if call.name.endswith("convolution"):
        return _convolved(call, x, rest, channels, (num, local_num))
    if any(held.shape and not equal(held.axes[0], x.axes[1]) for held in rest):
        return Misuse(f"{call.name} has weights that are shared out in another way than its channels", 0)
    held = evolve(x, fill=None)
    return (held, *(evolve(held, axes=(x.axes[0], channels)) for _ in call.shapes[1:]))


def _convolved(call: Call, x: Held, rest: list[Held], channels: Axis, nums: tuple[int, int]) -> tuple[Held, ...] | Misuse:
    weight, *bias = rest
    out = _by_group(weight.axes[0], *nums, call)
    if isinstance(out, Misuse):
        return out
    if (
        not equal(out, channels)
        or not all(map(is_all, weight.axes[1:]))
        or any(not equal(b.axes[0], weight.axes[0]) for b in bias)
    ):
        return Misuse(f"{call.name} has groups of channels and of weights that are shared out in other ways", 1)
    axes = (x.axes[0], weight.axes[0], *map(whole, call.shapes[0][2:]))
    return (evolve(x, axes=axes, fill=None),)


def _by_group(axis: Axis, num: int, local_num: int, call: Call) -> Axis | Misuse:
    """Return how the groups of channels are shared out, if ranks have whole ones."""
    size, local = size_of(axis), local_size(axis, call.rank)
    if local_num == 0 or local % local_num:
        return Misuse(f"{call.name} makes {local_num} groups of {local} channels", 0)
    found = reshape((axis,), (num, size // num), (local_num, local // local_num), call.rank)
    if isinstance(found, str) or not is_all(found[1]):
        cause = f"{call.name} makes {local_num} groups of {local} channels, of {num} groups of {size} in the whole model"
        return Misuse(f"{cause}, and ranks do not have whole groups", 0)
    assert parts_in(found[0]) is not None or is_all(found[0]), "channels are whole, or shared out by groups"
    return found[0]
