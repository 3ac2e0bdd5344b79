"""What may mend a fault of a split model: changes of its layout, likeliest first; each is still to be tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from attrs import frozen

from ...specs.layout_steps import ForkRng, LayoutStep, SumGradient, Sync
from ...specs.paths import module_of, name_of
from ...specs.tree import SpecTree
from ...specs.verb_call import VerbCall
from .held import UNKNOWN, Held, Kind
from .relation import Taken
from .rules import rule_of
from .tape import RecordedCall, Tape, operator_call, references
from .typed_run import Fault, Found, Types

_FAR = 12
"""Calls that are looked back, from where a value is used to where a module gives or takes it."""


@frozen
class Mend:
    """A change of a layout.

    Args:
        calls: Verbs that are called.
        without: Layout steps that are left out.
    """

    calls: tuple[VerbCall, ...] = ()
    without: tuple[LayoutStep, ...] = ()

    def __str__(self) -> str:
        left = dict.fromkeys(f"{step.describe()} at {step.module!r}" for step in self.without)
        told = f"sch{''.join(map(str, self.calls))}" if self.calls else ""
        return ", and ".join(filter(None, [f"Leave out {', '.join(left)}" if left else "", told]))


def candidates(found: Found, tree: SpecTree) -> list[Mend]:
    """Return changes that may mend a fault, likeliest first, each once.

    Args:
        found: The fault.
        tree: The model's tensors.
    """
    return list(dict.fromkeys(_Search(found.fault, found.local, found.types, found.layout, tree).all()))


@frozen(eq=False)
class _Search:
    fault: Fault
    local: Tape
    types: Types
    layout: Sequence[LayoutStep]
    tree: SpecTree

    def all(self) -> Iterator[Mend]:
        call = self.local.calls[self.fault.call] if self.fault.call >= 0 else None
        if self.fault.kind == "gradient":
            yield from self._of_gradient()
            return
        if call is not None and call.step is not None:
            yield from self._of_step(self.layout[call.step])
        if call is not None and (call.is_random or call.arguments.get("dropout_p")):
            yield from self._of_random_numbers(call)
        yield from self._counted_twice(call)
        values = [self.fault.value] if self.fault.value is not None else []
        values += [ref.value for ref in references(call)] if call is not None else []
        for value in dict.fromkeys(values):
            if self._held(value).kind == "summand" or self._held(value).lacks or self._held(value).unmasked:
                yield from self._summed(value)
        for value in dict.fromkeys(values):
            if self._held(value).kind == "parts":
                yield from self._joined(value, call)
        if call is not None and not any(self._held(value).kind in {"parts", "summand"} for value in values):
            yield from self._joined_around(call)

    def _held(self, value: int) -> Held:
        return self.types.held.get(value, UNKNOWN)

    # forward

    def _of_step(self, step: LayoutStep) -> Iterator[Mend]:
        """Iterate over changes of a layout step that takes what it cannot take."""
        yield Mend((), (step,))
        if isinstance(step, Sync) and step.mesh_axis != "tensor":
            yield Mend((_sync(step.module, step.when, step.op, step.axis, step.which),), (step,))
        value = self.fault.value
        if isinstance(step, Sync) and value is not None:
            held = self._held(value)
            if held.kind == "parts" and held.split_axis is not None:
                axis = _axis(held)
                if step.op != "all_gather" or step.axis != axis:
                    yield Mend((_sync(step.module, step.when, "all_gather", axis, step.which),), (step,))
            if held.kind == "summand":
                yield Mend((_sync(step.module, step.when, "all_reduce", None, step.which),), (step,))

    def _of_random_numbers(self, call: RecordedCall) -> Iterator[Mend]:
        forks = [step for step in self.layout if isinstance(step, ForkRng)]
        around = [step for step in forks if _is_within(call.module, step.module)]
        if call.is_forked:
            yield Mend((VerbCall(call.module, "share_rng"),))
            for step in around:
                yield Mend((), (step,))
        else:
            yield Mend((VerbCall(call.module, "fork_rng"),))

    def _counted_twice(self, call: RecordedCall | None) -> Iterator[Mend]:
        """Iterate over sums of what all ranks have alike, to be left out."""
        values = [ref.value for ref in references(call)] if call is not None else []
        values += [self.fault.value] if self.fault.value is not None else []
        origins = {self._held(value).origin for value in values if self._held(value).scale != 1}
        for step in self.layout:
            if isinstance(step, Sync) and step.module in origins and step.when in {"forward_pre", "forward_post"}:
                yield Mend((), (step,))

    def _summed(self, value: int) -> Iterator[Mend]:
        """Iterate over sums where a summand is made."""
        for near in self._chain(value, "summand"):
            for path, which in self._givers(near):
                yield Mend((_sync(path, "forward_post", "all_reduce", None, which),))
        for near in self._chain(value, "summand"):
            yield from self._of_bare_tensors(self.types.producers.get(near), "outputs")

    def _of_bare_tensors(self, number: int | None, what: str) -> Iterator[Mend]:
        """Iterate over sums around the product of a call with a tensor of the model that code uses directly."""
        for ref in references(self.local.calls[number]) if number is not None else ():
            path = self._tensor(ref.value)
            if path and self._held(ref.value).kind == "parts":
                yield Mend((VerbCall(path, "sum_products", (what,)),))

    def _tensor(self, value: int) -> str:
        """Return the path of the model's tensor that a value is, or is a view of; empty if it is neither."""
        while not (path := self.local.values[value].path):
            producer = self.types.producers.get(value)
            operands = references(self.local.calls[producer]) if producer is not None else []
            if len(operands) != 1:
                return ""
            value = operands[0].value
        return self.tree[path].path

    def _joined(self, value: int, call: RecordedCall | None) -> Iterator[Mend]:
        """Iterate over gathers where parts are made; what follows is split again, or stays whole."""
        for near in self._chain(value, "parts"):
            held = self._held(near)
            if held.split_axis is None:
                continue
            for path, which in self._givers(near):
                joined = _sync(path, "forward_post", "all_gather", _axis(held), which)
                yield Mend((joined,))
                if call is not None and call.module and not _is_within(path, call.module):
                    again = _sync(call.module, "backward_pre", "all_gather", _axis(held), 0)
                    yield Mend((joined, again))

    def _joined_around(self, call: RecordedCall) -> Iterator[Mend]:
        """Iterate over gathers of what a module is given, for its code counts what it has."""
        number = next((n for n, other in enumerate(self.local.calls) if other is call), -1)
        around = [m for m in self.local.modules if m.start <= number < m.stop and m.path == call.module]
        for value in dict.fromkeys(value for module in around for value in module.inputs):
            if self._held(value).kind == "parts":
                yield from self._joined(value, call)

    # backward

    def _of_gradient(self) -> Iterator[Mend]:
        fault = self.fault
        path = self.local.values[fault.value].path if fault.value is not None else ""
        if fault.cause != "summand":
            yield from self._summed_twice(path)
        elif path:
            yield Mend((VerbCall(self.tree[path].path, "sum_gradient"),))
        if fault.value is not None and not path:
            yield from self._gradient_summed(fault.value, fault.call)
            yield from self._of_bare_tensors(fault.call, "gradients")

    def _summed_twice(self, path: str) -> Iterator[Mend]:
        """Iterate over sums of a gradient that has been summed, to be left out."""
        sums = [step for step in self.layout if _sums_gradient(step)]
        for step in sums:
            if isinstance(step, SumGradient) and path and (step.module, step.name) == (module_of(path), name_of(path)):
                yield Mend((), (step,))
        for step in sums:
            if step.module == self.fault.path and not isinstance(step, SumGradient):
                yield Mend((), (step,))
        for step in sums:
            if isinstance(step, Sync) and step.when == "forward_pre" and step.module == self.fault.path:
                taken = self._taken_by(step)
                for giver, which in self._givers(taken) if taken is not None else ():
                    yield Mend((_sync(giver, "forward_post", "all_gather", step.axis, which),), (step,))

    def _taken_by(self, step: LayoutStep) -> int | None:
        """Return the value that a layout step takes."""
        at = next(n for n, other in enumerate(self.layout) if other is step)
        calls = (call for call in self.local.calls if call.step == at)
        return next((ref.value for call in calls for ref in references(call)[:1]), None)

    def _gradient_summed(self, value: int, number: int) -> Iterator[Mend]:
        """Iterate over sums of a gradient at modules that take or give a value, or a value that it is made of."""
        for near in self._chain(value, "whole"):
            for module in self.local.modules:
                if module.start <= number < module.stop and module.path:
                    for which in self._places(module.inputs, near):
                        yield Mend((_sync(module.path, "backward_post", "all_reduce", None, which),))
            for path, which in self._givers(near, number):
                yield from self._of_features(value, near, path, which)
                yield Mend((_sync(path, "backward_pre", "all_reduce", None, which),))

    def _of_features(self, value: int, near: int, path: str, which: int) -> Iterator[Mend]:
        """Iterate over the sum of the gradient of some features, if code takes these of what a module gives."""
        for made in self._chain(value, "whole"):
            producer = self.types.producers.get(made)
            call = self.local.calls[producer] if producer is not None else None
            if call is None or near not in [ref.value for ref in references(call)]:
                continue
            rule, shape = rule_of(operator_call(self.local, call)), self.local.values[near].shape
            if isinstance(rule, Taken) and rule.axis % len(shape) == len(shape) - 1:
                start, stop = rule.ranges[call.results.index(made)]
                told = (("which", which),) if which else ()
                options = (*told, ("features", (start, min(stop, shape[-1]))))
                yield Mend((VerbCall(path, "sync", ("backward_pre", "all_reduce"), options),))

    # places

    def _chain(self, value: int, kind: Kind) -> Iterator[int]:
        """Iterate over a value and the values of a kind that it is made of, nearest first."""
        waiting, seen = [value], {value}
        while waiting and len(seen) <= _FAR:
            near = waiting.pop(0)
            yield near
            producer = self.types.producers.get(near)
            if producer is None:
                continue
            for ref in references(self.local.calls[producer]):
                held, info = self._held(ref.value), self.local.values[ref.value]
                is_real = info.dtype.startswith(("float", "bfloat", "complex"))
                if ref.value not in seen and held.kind == kind and not info.path and is_real:
                    seen.add(ref.value)
                    waiting.append(ref.value)

    def _givers(self, value: int, before: int | None = None) -> Iterator[tuple[str, int]]:
        """Iterate over the modules that return a value, innermost first, each with its place among their tensors."""
        for module in self.local.modules:
            if module.path and (before is None or module.stop <= before):
                for which in self._places(module.outputs, value):
                    yield module.path, which

    def _places(self, values: Sequence[int], value: int) -> Iterable[int]:
        real = [v for v in values if self.local.values[v].dtype.startswith(("float", "bfloat", "complex"))]
        return [real.index(value)] if value in real else []


def _sync(path: str, when: str, op: str, axis: int | None, which: int) -> VerbCall:
    options: tuple[tuple[str, object], ...] = (("axis", axis),) if axis is not None else ()
    return VerbCall(path, "sync", (when, op), (*options, ("which", which)) if which else options)


def _axis(held: Held) -> int | None:
    """Return the axis that is shared out, counted from the end if it is the last."""
    at = held.split_axis
    return -1 if at is not None and at == len(held.axes) - 1 else at


def _sums_gradient(step: LayoutStep) -> bool:
    if isinstance(step, Sync):
        return step.when in {"backward_pre", "backward_post"} or (step.when, step.op) == ("forward_pre", "all_gather")
    return isinstance(step, SumGradient)


def _is_within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")
