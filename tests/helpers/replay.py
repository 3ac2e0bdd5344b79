"""Run what a tape says, operator by operator, on tensors with values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shardplan.functional.types.tape import ValueRef

if TYPE_CHECKING:
    from shardplan.functional.types.tape import RecordedCall, Tape


def replayed(tape: Tape, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the outputs that the calls of a tape give, with a model's tensors and these inputs.

    A call is found by its name and the names of its arguments; views of one memory change with it, as they did.
    """
    named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    held = {number: named[value.path] for number, value in enumerate(tape.values) if value.path}
    held |= {number: inputs[name] for name, number in tape.inputs.items()}

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(item) for item in value]
        return held[value.value] if isinstance(value, ValueRef) else value

    for call in tape.calls:
        arguments = {name: given(value) for name, value in call.arguments.items()}
        if call.name == "constant":
            value = tape.values[call.results[0]]
            made = torch.tensor(call.arguments["values"], dtype=getattr(torch, value.dtype)).reshape(value.shape)
        else:
            made = arguments["view"] if call.name == "written" else _operator(call)(**arguments)
        results = made if isinstance(made, (tuple, list)) else [made]
        held |= dict(zip(call.results, (result for result in results if isinstance(result, Tensor)), strict=True))
    return [held[number] for number in tape.outputs]


def _operator(call: RecordedCall) -> Any:
    home, _, name = call.name.rpartition("::")
    packet = getattr(getattr(torch.ops, home or "aten"), name)
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return next(found for found in overloads if _takes(found, call))


def _takes(overload: Any, call: RecordedCall) -> bool:
    """Tell whether an overload has arguments of these names, and tensors where the call has tensors."""
    taken = {argument.name: str(argument.type) for argument in overload._schema.arguments}
    return taken.keys() == call.arguments.keys() and all(
        value is None or isinstance(value, ValueRef) == ("Tensor" in taken[name] and "List" not in taken[name])
        for name, value in call.arguments.items()
    )
