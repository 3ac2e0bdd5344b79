"""The inputs of a comparison: given, or made; and each place along ``data`` its rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...specs.errors import PlanError, Problem
from ...specs.layout_steps import Sync
from ...specs.mesh import Mesh
from ..frontends.model_inputs import made_inputs, why_no_inputs
from ..model.rng_state import derive_seed
from ..schedule import Schedule
from .exact import LIFTED

_PRIMES = (3, 5, 7, 11, 13)
_LENGTH = 11


def inputs_for(sch: Schedule, seed: int) -> dict[str, Any]:
    """Return inputs for the model of a schedule: its batch and its length divide neither each other nor the mesh.

    Args:
        sch: The schedule.
        seed: Seed of the inputs.

    Raises:
        PlanError: If the model does not tell what it is called with.
    """
    model, mesh = sch.runtime.model, sch.mesh
    batch = next(prime for prime in _PRIMES if all(num % prime for num in (mesh.tensor, mesh.data, mesh.pipe)))
    is_split = any(isinstance(step, Sync) and step.axis == 1 for step in sch.layout)
    length = mesh.tensor * (3 if mesh.tensor % 3 else 5) if is_split else _LENGTH
    inputs = made_inputs(model, batch * mesh.data, length, seed)
    if inputs is None:
        takes = inspect.signature(model.forward)
        cause = f"what this {type(model).__name__} is called with cannot be told: its forward takes {takes}"
        if hasattr(model, "config"):
            cause = f"{cause}; inputs made from its configuration fail: {why_no_inputs(model)}"
        rows = "by argument name, the rows of all data ranks along axis 0"
        raise PlanError([Problem("inputs", cause, f"verify(sch, inputs={{'x': torch.randn(6, 8)}}): {rows}")])
    return inputs


def inputs_of_places(model: nn.Module, inputs: Mapping[str, Any], mesh: Mesh, seed: int) -> tuple[dict[str, Any], ...]:
    """Return the inputs of each place along ``data``: its rows of tensors, in double precision, and no cache.

    Tensors with as many rows as the first tensor are split along axis 0; all others are given to each place.

    Raises:
        PlanError: If the rows cannot be divided.
    """
    inputs = dict(inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    rows = next((value.shape[0] for value in tensors.values() if value.dim()), 1)
    if rows % mesh.data:
        cause = f"they have {rows} rows, which {mesh.data} ranks along data cannot share"
        raise PlanError([Problem("inputs", cause, f"Give {mesh.data * max(1, rows // mesh.data)} rows")])
    part = rows // mesh.data
    return tuple(
        {
            name: _of_place(name, value, rows, part, place, seed) if isinstance(value, Tensor) else value
            for name, value in (inputs | _no_cache(model)).items()
        }
        for place in range(mesh.data)
    )


def _no_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that asks for no cache of keys and values, if the model takes it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _of_place(name: str, value: Tensor, rows: int, part: int, place: int, seed: int) -> Tensor:
    if value.is_meta:
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        shape = tuple(value.shape)
        value = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            if value.is_floating_point()
            else torch.zeros(shape, dtype=value.dtype)
        )
    value = value.detach().cpu().to(LIFTED.get(value.dtype, value.dtype))
    return value[place * part : (place + 1) * part].clone() if value.dim() and value.shape[0] == rows else value.clone()
