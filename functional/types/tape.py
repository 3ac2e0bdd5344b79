"""What a model computes in one run, written down: the calls of operators, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import Factory, define, frozen

from .relation import Operand, OperatorCall, Shape

VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"})
"""Operators that give a tensor another shape; which one runs depends on the memory of the tensor."""


@frozen
class ValueRef:
    """A tensor among the arguments of a recorded call.

    Args:
        value: Number of the value on the tape.
        requires_grad: Whether autograd follows it here.
    """

    value: int
    requires_grad: bool


@frozen
class Value:
    """A tensor of the tape.

    Args:
        shape: Its shape.
        dtype: Its dtype, as ``float32``.
        path: Canonical path of the model's tensor that it is; empty for activations.
        storage: Number of its memory: views of one memory have the same.
    """

    shape: Shape
    dtype: str
    path: str = ""
    storage: int = -1

    @property
    def is_real(self) -> bool:
        """Whether its entries are real or complex numbers, and no integers or truth values."""
        return self.dtype.startswith(("float", "bfloat", "complex"))


@frozen(eq=False)
class RecordedCall:
    """A call of an operator.

    Args:
        name: The operator, without its overload.
        arguments: Its arguments by name, with defaults; tensors as :class:`ValueRef`, also in lists.
        results: Numbers of the values that it returns. An operator in place returns a new number for the changed value.
            A call ``written`` follows for each other view of the memory: of the view's old value and the changed value, it
            returns the view's new value.
        module: Path of the innermost module that runs.
        line: Where the model's code calls it, as ``modeling_llama.py:123``.
        step: Place of the layout step whose own code runs it; None for the model's code.
        is_pointwise: Whether torch says that it works entry by entry.
        is_random: Whether it draws random numbers.
        is_forked: Whether random numbers drawn here differ on the ranks along ``tensor``.
        function: Name of the user's ``autograd.Function`` whose forward pass runs it; empty for none.
        is_guessed: Whether its result, or its size, depends on values that are not known, so that it was assumed.
    """

    name: str
    arguments: Mapping[str, Any]
    results: tuple[int, ...]
    module: str
    line: str = ""
    step: int | None = None
    is_pointwise: bool = False
    is_random: bool = False
    is_forked: bool = False
    function: str = ""
    is_guessed: bool = False


@frozen(eq=False)
class ModuleCall:
    """A module that was called.

    Args:
        path: Its path.
        inputs: Numbers of the tensors among its arguments, before the hooks of layout steps.
        outputs: Numbers of the tensors in what it returns, after these hooks.
        start: Number of calls on the tape when it began.
        stop: And when it ended.
    """

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    start: int
    stop: int


@frozen(eq=False)
class SkippedLayer:
    """A repeated layer that did not run: its representative's results stand for its own.

    Args:
        path: Its path.
        representative: Path of the layer that ran.
        inputs: Numbers of the tensors that it was called with.
        representative_inputs: Numbers of those of the layer that ran.
    """

    path: str
    representative: str
    inputs: tuple[int, ...]
    representative_inputs: tuple[int, ...]


@define(eq=False)
class BackwardCode:
    """Code of the user's own that runs in the backward pass: of an ``autograd.Function``, or a hook of a tensor.

    Args:
        name: Name of the function or of the hook.
        module: Path of the innermost module that ran where the function was called, or the hook registered.
        line: Where the model's code did so.
        step: Place of the layout step whose own code did so; None for the model's code.
        inputs: The values whose gradients it returns, in order; None for those without a gradient.
        outputs: The values whose gradients it takes, by place: the results of the function, or the tensor with the hook.
        made: All values that the function's forward pass made.
        is_hook: Whether it is a hook of a tensor.
        is_removed: Whether the hook was removed before the forward pass ended.
        takes: Values of the gradients that it was run with, in order.
        gives: Values of the gradients that it returned, in order; None for none.
        calls: The calls that it ran.
        error: Why it could not be run; empty if it was run.
    """

    name: str
    module: str
    line: str
    step: int | None
    inputs: list[int | None]
    outputs: dict[int, int] = Factory(dict)
    made: set[int] = Factory(set)
    is_hook: bool = False
    is_removed: bool = False
    takes: list[int] = Factory(list)
    gives: list[int | None] = Factory(list)
    calls: list[RecordedCall] = Factory(list)
    error: str = ""


@define(eq=False)
class Tape:
    """A run of a model on fake tensors.

    Args:
        values: All values, by number.
        calls: All calls, in order.
        modules: All calls of modules, in the order in which they ended.
        skipped: Repeated layers that did not run.
        inputs: The value of each input tensor of the model, by argument name.
        outputs: The values of the tensors that the model returns.
        numbers: The plain numbers that the model returns.
        changed: The value that each tensor of the model has at the end, by canonical path, if it is another one.
        num_calls: How often each module was called, by path.
        backward: Code of the user's own that runs in the backward pass, in the order in which the forward pass met it.
        reached: Paths of the trained tensors to which torch's own backward pass comes from the outputs.
    """

    values: list[Value] = Factory(list)
    calls: list[RecordedCall] = Factory(list)
    modules: list[ModuleCall] = Factory(list)
    skipped: list[SkippedLayer] = Factory(list)
    inputs: dict[str, int] = Factory(dict)
    outputs: list[int] = Factory(list)
    numbers: list[float] = Factory(list)
    changed: dict[str, int] = Factory(dict)
    num_calls: dict[str, int] = Factory(dict)
    backward: list[BackwardCode] = Factory(list)
    reached: set[str] = Factory(set)


def references(call: RecordedCall) -> list[ValueRef]:
    """Return the tensors among the arguments of a call, also in lists, in the order of its arguments."""
    return list(_references(call.arguments.values()))


def _references(values: Iterable[Any]) -> Iterator[ValueRef]:
    for value in values:
        if isinstance(value, ValueRef):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _references(value)


def operator_call(tape: Tape, call: RecordedCall) -> OperatorCall:
    """Return a recorded call as the rules of operators see it."""
    operands: list[Operand] = []

    def met(value: Any) -> Any:
        if isinstance(value, ValueRef):
            known = tape.values[value.value]
            operands.append(Operand(len(operands), known.shape, is_mask=known.dtype == "bool"))
            return operands[-1]
        return type(value)(map(met, value)) if isinstance(value, (list, tuple)) else value

    arguments = {name: met(value) for name, value in call.arguments.items()}
    shapes = tuple(tape.values[result].shape for result in call.results)
    return OperatorCall(call.name, arguments, tuple(operands), shapes, call.is_pointwise)
