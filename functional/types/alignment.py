"""Two runs of the same code, call by call: the whole model's, and a rank's with other sizes and calls of layout steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from attrs import define, evolve, field, frozen

from ...specs.layout_steps import AddBiasAfterSync, LayoutStep
from ...specs.paths import join
from .tape import VIEWS, RecordedCall, Tape, ValueRef, references
from .typed_run import Types

NEUTRAL = frozenset({"clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy"})
"""Operators that return the values of their operand, in memory of another kind."""


@frozen(eq=False)
class Pair:
    """A call of a rank's run, and the call of the whole model's run that it stands for.

    Args:
        number: Its place on the tape.
        call: The rank's call.
        kind: ``step`` (of a layout step), ``copy`` (of the operand's values), ``both``, ``written`` (into a view that the
            whole model does not make), or ``lost``.
        other: The whole model's call, for ``both``.
        lacks: Paths of biases that the rank adds later.
        cause: Why there is no such call, for the first that is ``lost``.
        is_wrong: Whether that is certain to be wrong, and not only more than can be told.
    """

    number: int
    call: RecordedCall
    kind: Literal["step", "copy", "both", "written", "lost"]
    other: RecordedCall | None = None
    lacks: frozenset[str] = frozenset()
    cause: str = ""
    is_wrong: bool = False


@define(eq=False)
class Alignment:
    """Two runs of the same code.

    Args:
        local: The rank's run.
        model: The whole model's run.
        layout: The steps that change how modules compute.
        types: Which value of the whole model's run each of the rank's stands for; filled in while the pairs are followed.
    """

    local: Tape
    model: Tape
    layout: Sequence[LayoutStep]
    types: Types
    late: frozenset[str] = field(init=False)
    """Modules that add their bias later than in the whole model."""

    def __attrs_post_init__(self) -> None:
        self.late = frozenset(step.module for step in self.layout if isinstance(step, AddBiasAfterSync))

    def pairs(self) -> Iterator[Pair]:
        """Iterate over the calls of the rank's run."""
        theirs = self._their_calls()
        following, pending = True, None
        for number, call in enumerate(self.local.calls):
            if call.step is not None:
                yield Pair(number, call, "step")
            elif call.name in NEUTRAL or _is_identity(self.local, call):
                yield Pair(number, call, "copy")
            elif not following:
                yield Pair(number, call, "lost")
            else:
                other, pending = pending or next(theirs, None), None
                lacks = self._lacking_bias(call, other) if other else frozenset[str]()
                other = _without_bias(other) if other and lacks else other
                if call.name == "slice" and (
                    other is None or other.name != "slice"
                ):  # torch leaves out slices of everything
                    other, pending = self._slice_of_all(call), other
                if call.name == "written" != (other and other.name):  # of a slice that the whole model leaves out
                    pending = other
                    yield Pair(number, call, "written")
                    continue
                if other is not None and other.name == "slice" != call.name and (cause := self._all_of(other)):
                    yield Pair(number, call, "lost", cause=cause, is_wrong=True)
                    following = False
                    continue
                following = other is not None and _name(other) == _name(call)
                if following:
                    yield Pair(number, call, "both", other, lacks)
                else:
                    named = f"{other.name} in {other.module or 'the model'}" if other else "nothing more"
                    cause = f"its code calls {call.name} at local sizes, where the whole model calls {named}"
                    yield Pair(number, call, "lost", cause=cause)
        rest = pending or next(theirs, None)
        if following and rest is not None:
            cause = f"its code calls {rest.name} in the whole model, and not at local sizes"
            yield Pair(-1, rest, "lost", cause=cause)

    def theirs(self, value: int) -> int:
        """Return the value of the whole model's run that a value equals: the operand of a copy."""
        return self.types.copies.get(value, value)

    def _their_calls(self) -> Iterator[RecordedCall]:
        for call in self.model.calls:
            if call.name in NEUTRAL or _is_identity(self.model, call):
                operand = references(call)[0]
                self.types.copies |= dict.fromkeys(call.results, self.theirs(operand.value))
            else:
                yield call

    def _slice_of_all(self, call: RecordedCall) -> RecordedCall | None:
        """Return the call that the whole model leaves out, as it would take all entries."""
        value = references(call)[0].value
        counterpart = self.types.counterparts.get(value, -1)
        if path := self.local.values[value].path:
            counterpart = next(at for at, other in enumerate(self.model.values) if other.path == path)
        if counterpart < 0:
            return None
        arguments = {**call.arguments, "self": ValueRef(counterpart, requires_grad=False), "start": 0, "end": 2**63 - 1}
        return evolve(call, arguments=arguments, results=(counterpart,))

    def _all_of(self, other: RecordedCall) -> str:
        """Say that a rank takes all entries of parts where the whole model takes some, if it does."""
        operand = self.theirs(references(other)[0].value)
        value = next((mine for mine, theirs in reversed(self.types.counterparts.items()) if theirs == operand), None)
        held = self.types.held.get(value) if value is not None else None
        if held is None or held.kind != "parts" or held.split_axis != other.arguments["dim"] % len(held.axes):
            return ""
        start, end = other.arguments["start"] or 0, other.arguments["end"]
        return f"its code takes all entries of parts, where the whole model takes those from {start} to {end}"

    def _lacking_bias(self, call: RecordedCall, other: RecordedCall) -> frozenset[str]:
        """Return the path of the bias that a module adds later than in the whole model."""
        is_late = call.module in self.late
        has_bias = other.name == "addmm" or other.arguments.get("bias") is not None
        lacks_bias = call.name == "mm" or (call.name == "linear" and call.arguments.get("bias") is None)
        return frozenset({join(call.module, "bias")}) if is_late and has_bias and lacks_bias else frozenset()


def _is_identity(tape: Tape, call: RecordedCall) -> bool:
    """Tell whether a call gives its operand the shape and the dtype that it has."""
    if call.name not in VIEWS:
        return False
    operand, result = tape.values[references(call)[0].value], tape.values[call.results[0]]
    return (operand.shape, operand.dtype) == (result.shape, result.dtype)


def _without_bias(call: RecordedCall) -> RecordedCall:
    """Return the product of a linear module without the bias."""
    if call.name == "addmm":
        return evolve(call, name="mm", arguments={"self": call.arguments["mat1"], "mat2": call.arguments["mat2"]})
    return evolve(call, arguments={**call.arguments, "bias": None})


def _name(call: RecordedCall) -> str:
    return "view" if call.name in VIEWS else call.name
