"""Is a model the one that was planned? Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...specs.errors import Problem
from ...specs.program import InitProgram
from ...specs.source import Made, ModuleCall, ModuleValues, OwnValues, Uninitialised
from .read import read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ...specs.param import ParamSpec
    from ...specs.plan import Plan

_LOST = "init code is planned to make it, and the model has values that would be lost"
_COMPARED = ("path", "orig_shape", "dtype", "kind", "tie", "requires_grad")


def differences(plan: Plan, model: nn.Module) -> Iterator[Problem]:
    """Iterate over what makes a model another one: paths, shapes, dtypes, kinds, ties, and whether values are there."""
    tree, problems = read_tensors(model)
    yield from problems
    for spec in plan.tree.values():
        if spec.path not in tree:
            yield Problem(spec.path, "the plan has this tensor, and the model has not", "Build the planned model", spec.type)
            continue
        found = tree[spec.path]
        other = [name for name in _COMPARED if getattr(found, name) != getattr(spec, name)]
        if other:
            words = "; ".join(f"{name} {getattr(found, name)!r} instead of {getattr(spec, name)!r}" for name in other)
            yield Problem(spec.path, f"the model is not the planned one: {words}", "Plan again", spec.type)
        if cause := _wrong_values(spec, has_values=isinstance(found.source, ModuleValues)):
            yield Problem(spec.path, cause, "Plan again with this model", spec.type)
    for path in tree:
        if path not in plan.tree:
            yield Problem(path, "the model has this tensor, and the plan has not", "Plan again", tree[path].type)


def _wrong_values(spec: ParamSpec, *, has_values: bool) -> str | None:
    match spec.source:
        case ModuleValues() | OwnValues() if not has_values and spec.num_elements:
            return "its planned source is the module's own values, and it is on meta"
        case Uninitialised() if has_values:
            return "it is planned without values, and the model has values"
        case InitProgram(replaces=False) if has_values:
            return _LOST
        case Made(calls=calls) if has_values and all(isinstance(call, ModuleCall) for call in calls):
            return _LOST
        case _:
            return None
