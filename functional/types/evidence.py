"""The types that were found, as evidence beside a plan: where modules begin and end, and within them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from ...specs.equality import ActivationType, CallType, Equality, ModuleTypes, Trust, layout_digest
from ..layout.local_model import LocalModel
from .alignment import NEUTRAL
from .check import Checked
from .held import UNKNOWN
from .tape import Tape
from .typed_run import Types


def evidence(
    checked: Checked, subject: LocalModel, trusted: Iterable[Trust], inputs: Literal["given", "made"] = "given"
) -> Equality:
    """Return the evidence that a split model computes what the whole model computes, and what nobody could follow.

    Args:
        checked: What was found, without problems.
        subject: The model that was followed.
        trusted: Modules of which the user's word was taken.
        inputs: Whether the user gave the example inputs, or they were made for this alone.
    """
    modules: tuple[ModuleTypes, ...] = ()
    calls: tuple[CallType, ...] = ()
    if checked.local is not None and checked.types is not None:
        modules, calls = tuple(_modules(checked.local, checked.types)), tuple(_calls(checked.local, checked.types))
    unfollowed = tuple(dict.fromkeys(checked.unfollowed))
    layout = layout_digest(subject.mesh, subject.tree, subject.layout)
    return Equality(modules, calls, unfollowed, tuple(trusted), inputs, torch.__version__, layout)


def _modules(local: Tape, types: Types) -> Iterator[ModuleTypes]:
    repeats: dict[str, list[str]] = {}
    for skip in local.skipped:
        repeats.setdefault(skip.representative, []).append(skip.path)
    seen: set[str] = set()
    for call in sorted(local.modules, key=lambda call: (call.start, -call.stop)):
        if call.path not in seen and call.outputs:
            seen.add(call.path)
            inputs, outputs = (tuple(_type(value, local, types) for value in each) for each in (call.inputs, call.outputs))
            yield ModuleTypes(call.path, inputs, outputs, tuple(repeats.get(call.path, ())))


def _calls(local: Tape, types: Types) -> Iterator[CallType]:
    for call in local.calls:
        if call.results and call.name not in NEUTRAL and call.name != "written":
            name = call.name.removeprefix("shardplan::")
            yield CallType(call.module, name, call.line, _type(call.results[0], local, types))


def _type(value: int, local: Tape, types: Types) -> ActivationType:
    held, mine = types.held.get(value, UNKNOWN), local.values[value]
    if held.kind == "unknown":
        return ActivationType(mine.dtype, tuple(map(str, mine.shape)), "unknown")
    return held.activation_type(mine.dtype)
