"""Code that is not followed call by call, but taken at the user's word: one call on the tape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import get_args

from attrs import evolve

from ...specs.equality import Trust
from ...specs.layout_steps import LayoutStep, Sync, SyncOp
from .tape import ModuleCall, RecordedCall, Tape, ValueRef, references

TRUSTED = "shardplan::trusted"
"""Name of the call that stands for a module which the user trusts."""

GIVEN = "shardplan::given"
"""Name of the call that stands for a user's function that synchronises."""


def with_macros(tape: Tape, layout: Sequence[LayoutStep], trusts: Iterable[Trust]) -> Tape:
    """Return a run in which trusted modules and functions of the user's are one call each.

    Args:
        tape: The run.
        layout: The layout steps, by place.
        trusts: The modules that the user trusts.
    """
    names = {trust.module for trust in trusts}
    users = {at for at, step in enumerate(layout) if isinstance(step, Sync) and step.op not in get_args(SyncOp)}
    opaque = {call.start: call for call in reversed(tape.modules) if call.path in names and call.stop > call.start}
    return evolve(tape, calls=list(_calls(tape, opaque, users))) if opaque or users else tape


def _calls(tape: Tape, opaque: dict[int, ModuleCall], users: set[int]) -> Iterator[RecordedCall]:
    number = 0
    while number < len(tape.calls):
        call = tape.calls[number]
        if number in opaque:
            module = opaque[number]
            inputs = [ValueRef(value, requires_grad=True) for value in module.inputs]
            yield RecordedCall(TRUSTED, {"inputs": inputs}, module.outputs, module.path, call.line)
            number = module.stop
        elif call.step in users:
            stop = number + 1
            while stop < len(tape.calls) and tape.calls[stop].step == call.step:
                stop += 1
            yield _given(tape.calls[number:stop])
            number = stop
        else:
            yield call
            number += 1


def _given(calls: Sequence[RecordedCall]) -> RecordedCall:
    made = {result for call in calls for result in call.results}
    taken = [ref for call in calls for ref in references(call) if ref.value not in made]
    first, last = calls[0], calls[-1]
    return evolve(first, name=GIVEN, arguments={"x": taken[0]} if taken else {}, results=last.results[:1])
