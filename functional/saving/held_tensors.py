"""Find a plan's tensors on this rank in the model that ``execute`` returned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...specs.dtypes import short_name
from ...specs.errors import PlanError, Problem
from ..dialects import dialect_of
from ..model.copy import get_tensor
from ..pipeline.stage_module import StageModule

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan

_EXAMPLE = "model, optimizer = execute(plan); then give this model"


def held_tensors(plan: Plan, model: Any, coordinate: Coordinate) -> Mapping[str, Tensor]:
    """Return the tensors that a rank holds, by canonical path, in the order of the plan; non-persistent buffers too.

    Args:
        plan: The executed plan.
        model: The model that ``execute`` returned: a module, DDP or DeepSpeed's engine around it, a pipeline.
        coordinate: The rank's coordinate.

    Raises:
        PlanError: If tensors are missing, or not as planned.
    """
    mine = [spec for spec in plan.tree.values() if coordinate.pipe in spec.places(plan.mesh)]
    modules, holding = modules_of(model, mine), dialect_of(plan.target).holding()
    found: dict[str, Tensor] = {}
    problems: list[Problem] = []
    for spec in mine:
        tensor = next((t for m in modules for path in spec.paths if (t := _tensor(m, path)) is not None), None)
        shape = None if tensor is None else holding.whole_shape(tensor)
        local = None if tensor is None else local_part(tensor)
        shape = tuple(local.shape) if local is not tensor and local is not None else shape
        if local is None or tensor is None:
            problems.append(Problem(spec.path, "the model does not have it on this rank", _EXAMPLE, spec.type))
        elif shape != spec.local_shape(coordinate) or local.dtype != getattr(torch, spec.dtype):
            dtype = str(local.dtype).removeprefix("torch.")
            cause = f"the model has {dtype}{list(shape or ())} on this rank, and the plan {short_name(spec.dtype)}"
            cause += f"{list(spec.local_shape(coordinate))}"
            problems.append(Problem(spec.path, cause, _EXAMPLE, spec.type))
        elif local.is_meta:
            problems.append(Problem(spec.path, "it is on meta, and has no values", _EXAMPLE, spec.type))
        else:
            found[spec.path] = local
    if problems:
        raise PlanError(problems)
    return found


def local_part(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor, which is always the same object; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def modules_of(model: Any, specs: Iterable[ParamSpec]) -> tuple[nn.Module, ...]:
    """Return the modules that hold tensors: this rank's stages, or the user's module without the runtimes around it.

    Raises:
        TypeError: If ``execute`` returns nothing of this type.
    """
    if not isinstance(model, nn.Module):
        stages = getattr(model, "modules", None)
        if isinstance(stages, tuple) and all(isinstance(stage, nn.Module) for stage in stages):
            return stages
        msg = f"it is the model that execute returned, not a {type(model).__name__}: model, optimizer = execute(plan)"
        raise TypeError(msg)
    stages = tuple(module for module in model.modules() if isinstance(module, StageModule))
    if stages:
        return stages
    first = next(iter(specs), None)
    while (
        first is not None
        and _tensor(model, first.path) is None
        and isinstance(model.__dict__["_modules"].get("module"), nn.Module)
    ):
        model = model.__dict__["_modules"]["module"]
    return (model,)


def _tensor(module: nn.Module, path: str) -> Tensor | None:
    try:
        found = get_tensor(module, path)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None
