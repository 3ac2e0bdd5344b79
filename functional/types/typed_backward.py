"""Follow gradients through code of the user's own that runs in the backward pass: functions, and hooks of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from attrs import define, evolve, field

from ..layout.local_model import LocalModel
from .axes import equal
from .follow import follow_backward
from .gradient import UNKNOWN_GRADIENT, Gradient, Kind, Met
from .held import UNKNOWN, Held, whole_of
from .tape import BackwardCode, Tape
from .typed_run import Fault, Types


@define(eq=False)
class TypedBackward:
    """The code of the user's own that runs in the backward pass of a rank's run, beside that of the whole model's run.

    Args:
        local: The rank's run.
        model: The whole model's run.
        subject: The split model.
        types: What ranks hold of the values of the forward pass.
        rank: The rank.
        faults: What was found.
    """

    local: Tape
    model: Tape
    subject: LocalModel
    types: Types
    rank: int = 0
    faults: list[Fault] = field(factory=list)
    _others: Mapping[int, BackwardCode] = field(init=False)
    _functions: Mapping[int, BackwardCode] = field(init=False)
    _hooks: Mapping[int, Sequence[BackwardCode]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        mine, theirs = _of_model(self.local), _of_model(self.model)
        alike = [(code.name, code.module) for code in mine] == [(code.name, code.module) for code in theirs]
        self._others = {id(code): other for code, other in zip(mine, theirs, strict=True)} if alike else {}
        self._functions = {value: code for code in mine for value in code.made}
        self._hooks = {}
        for code in (code for code in mine if code.is_hook and not code.is_removed):
            self._hooks = {**self._hooks, code.outputs[0]: (*self._hooks.get(code.outputs[0], ()), code)}

    def function_of(self, value: int) -> BackwardCode | None:
        """Return the function of which the forward pass made a value."""
        return self._functions.get(value)

    def hooked(self, value: int, total: Gradient) -> Gradient:
        """Return the gradient of a value after its hooks."""
        for code in self._hooks.get(value, ()):
            total = self.through(code, -1, {0: total}).get(value, UNKNOWN_GRADIENT)
        return total

    def through(self, code: BackwardCode, number: int, totals: Mapping[int, Gradient]) -> dict[int, Gradient]:
        """Return the gradients that code gives, by value.

        Args:
            code: The code.
            number: Number of the last call of its forward pass; -1 for a hook.
            totals: The gradients of its outputs, by place, where there are any.
        """
        wanted = [value for value in code.inputs if value is not None]
        if any(total.kind == "unknown" or self._held(code.outputs[at]).kind == "unknown" for at, total in totals.items()):
            return dict.fromkeys(wanted, UNKNOWN_GRADIENT)
        other = self._others.get(id(code))
        if other is None or len(code.takes) != len(other.takes) or len(code.gives) != len(other.gives):
            lost = self._lost(code, "the whole model runs other code in its backward pass")
        elif code.error or other.error:
            is_whole = all(total == evolve(total, kind="whole", scale=Fraction(1)) for total in totals.values())
            if is_whole and all(self._held(value).is_plain for value in (*wanted, *code.outputs.values())):
                return dict.fromkeys(wanted, Gradient("whole"))
            lost = self._lost(code, code.error or other.error)
        else:
            return self._followed(code, other, number, totals)
        return dict.fromkeys(wanted, lost)

    def _followed(
        self, code: BackwardCode, other: BackwardCode, number: int, totals: Mapping[int, Gradient]
    ) -> dict[int, Gradient]:
        pairs = enumerate(zip(code.takes, other.takes, strict=True))
        taken = [self._taken(code.outputs.get(at), pair, totals.get(at)) for at, pair in pairs]
        known = [held for held in taken if held is not None]
        wanted = [value for value in code.inputs if value is not None]
        if len(known) < len(taken):
            lost = self._lost(code, "nobody follows there what ranks hold of a gradient")
            return dict.fromkeys(wanted, lost)
        found = follow_backward(code, other, self.local, self.model, self.subject, self.types, taken=known, rank=self.rank)
        for fault in found.faults:
            kind = "unfollowed" if fault.kind == "unfollowed" else "forward"
            self.faults.append(Fault(number, code.module, f"{_named(code)}: {fault.cause}", kind=kind))
        if found.faults:
            return dict.fromkeys(wanted, UNKNOWN_GRADIENT)
        given: dict[int, Gradient] = {}
        mets = frozenset[Met]().union(*(total.met for total in totals.values()))
        for value, mine, theirs in zip(code.inputs, code.gives, other.gives, strict=False):
            if value is not None and (mine is not None or theirs is not None):
                made = self._given(code, value, mine, theirs, found)
                given[value] = evolve(made, met=mets or {Met(number, value)}) if made.kind == "summand" else made
        return given

    def _held(self, value: int) -> Held:
        return self.types.held.get(value, UNKNOWN)

    def _taken(self, value: int | None, pair: tuple[int, int], total: Gradient | None) -> Held | None:
        """Return what ranks hold of a gradient that code takes; None where there is no type for it."""
        shape, whole_shape = self.local.values[pair[0]].shape, self.model.values[pair[1]].shape
        if value is None:  # nothing uses the result
            return whole_of(shape) if shape == whole_shape else None
        held = self._held(value)
        if held.is_due or held.kind not in {"whole", "parts", "summand"}:
            return None
        kind = "parts" if held.kind == "parts" else "whole"
        plain = Held(kind, held.axes)
        if total is None:
            return plain
        if total.kind == "shared" or (total.kind == "parts") != (kind == "parts"):
            return None
        return evolve(plain, kind="summand" if total.kind == "summand" else kind, scale=total.scale)

    def _given(self, code: BackwardCode, value: int, mine: int | None, theirs: int | None, found: Types) -> Gradient:
        """Return the gradient of an operand that code has returned; note it if it is not what the operand has to have."""
        if mine is None or theirs is None:
            return self._lost(code, "it returns no gradient, and does in the whole model, or the other way around")
        held, operand = found.held.get(mine, UNKNOWN), self._held(value)
        counterpart = found.counterparts.get(mine, -1)
        if found.copies.get(counterpart, counterpart) != found.copies.get(theirs, theirs):
            return self._lost(code, "it returns other values than in the whole model")
        if "unknown" in {held.kind, operand.kind} or operand.is_due or held.lacks or held.unmasked:
            return self._lost(code, held.origin or "the type of what it returns is not known")
        needed = "parts" if operand.kind == "parts" else "whole"
        is_kind = held.kind == needed or (held.kind == "summand" and operand.kind == "whole")
        if is_kind and all(map(equal, held.axes, operand.axes)):
            return Gradient(_KINDS[held.kind], held.scale, scaled_by=code.module if held.scale != 1 else "")
        dtype = self.local.values[mine].dtype
        shown, right = held.activation_type(dtype), evolve(operand, kind=needed).activation_type(dtype)
        self.faults.append(Fault(-1, code.module, f"{_named(code)} returns {shown}, and the gradient is {right}"))
        return UNKNOWN_GRADIENT

    def _lost(self, code: BackwardCode, cause: str) -> Gradient:
        self.faults.append(Fault(-1, code.module, f"{_named(code)}: {cause}", kind="unfollowed"))
        return UNKNOWN_GRADIENT


_KINDS: Mapping[str, Kind] = {"parts": "parts", "summand": "summand", "whole": "whole"}


def _of_model(tape: Tape) -> list[BackwardCode]:
    """Return the code that is the model's own, and not that of a layout step."""
    return [code for code in tape.backward if code.step is None]


def _named(code: BackwardCode) -> str:
    told = f" ({code.line})" if code.line else ""
    if not code.is_hook:
        return f"the backward pass of {code.name}{told}"
    return f"the hook {code.name} of a gradient{told}" if code.name != "<lambda>" else f"a hook of a gradient{told}"
