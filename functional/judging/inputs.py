"""The inputs of a comparison: given, or made; and each place along ``data`` its rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ...specs.errors import PlanError, Problem
from ...specs.layout_steps import Sync
from ...specs.mesh import Mesh
from ..frontends.model_inputs import made_inputs, why_no_inputs
from ..model.rng_state import derive_seed
from ..schedule import Schedule
from .exact import LIFTED

_PRIMES = (3, 5, 7, 11, 13)
_LENGTH = 11


def inputs_for(sch: Schedule, seed: int, num_rows: int | None = None, length: int | None = None) -> dict[str, Any]:
    """Return inputs for the model of a schedule: its batch and its length divide neither each other nor the mesh.

    Args:
        sch: The schedule.
        seed: Seed of the inputs.
        num_rows: Rows of all data ranks; None to choose them.
        length: Tokens of a row; None to choose it.

    Raises:
        PlanError: If the model does not tell what it is called with.
    """
    model, mesh = sch.runtime.model, sch.mesh
    batch = next(prime for prime in _PRIMES if all(num % prime for num in (mesh.tensor, mesh.data, mesh.pipe)))
    is_split = any(isinstance(step, Sync) and step.axis == 1 for step in sch.layout)
    chosen = mesh.tensor * (3 if mesh.tensor % 3 else 5) if is_split else _LENGTH
    inputs = made_inputs(model, num_rows or batch * mesh.data, length or chosen, seed)
    if inputs is None:
        takes = inspect.signature(model.forward)
        cause = f"what this {type(model).__name__} is called with cannot be told: its forward takes {takes}"
        if why := why_no_inputs(model):
            cause = f"{cause}; inputs made for it fail: {why}"
        rows = "by argument name, the rows of all data ranks along axis 0"
        raise PlanError([Problem("inputs", cause, f"In Python: verify(sch, inputs={{'x': torch.randn(6, 8)}}): {rows}")])
    return inputs


def inputs_of_places(model: nn.Module, inputs: Mapping[str, Any], mesh: Mesh, seed: int) -> tuple[dict[str, Any], ...]:
    """Return the inputs of each place along ``data``: its rows of tensors, in double precision, and no cache.

    Tensors with as many rows as the first tensor are split along axis 0, also in lists and dictionaries; all others are
    given to each place.

    Raises:
        PlanError: If the inputs are no mapping by argument name, or their rows cannot be divided.
    """
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in inputs):
        takes = inspect.signature(model.forward)
        cause = f"they are a {type(inputs).__name__}, not tensors by argument name; the model's forward takes {takes}"
        raise PlanError([Problem("inputs", cause, "verify(sch, {'x': torch.randn(6, 8)})")])
    inputs = dict(inputs)
    rows = next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if rows is not None and (rows % mesh.data or not rows):
        shared = f", which {mesh.data} ranks along data cannot share" if rows else ""
        cause = f"the first tensor has {rows} rows along axis 0{shared}"
        fix = f"Give {mesh.data * max(1, rows // mesh.data)} rows, and a tensor that has the rows of all data ranks first"
        raise PlanError([Problem("inputs", cause, fix)])
    part = (rows or 0) // mesh.data

    def of_place(place: int, name: str, value: Any) -> Any:
        return _of_place(name, value, rows, part, place, seed) if isinstance(value, Tensor) else value

    return tuple(
        {
            name: tree_map(lambda leaf, at=place, name=name: of_place(at, name, leaf), value)
            for name, value in (inputs | _no_cache(model)).items()
        }
        for place in range(mesh.data)
    )


def _no_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that asks for no cache of keys and values, if the model takes it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _of_place(name: str, value: Tensor, rows: int | None, part: int, place: int, seed: int) -> Tensor:
    if value.is_meta:
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        shape = tuple(value.shape)
        value = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            if value.is_floating_point()
            else torch.randint(2, shape, generator=generator).to(value.dtype)
        )
    value = value.detach().cpu().to(LIFTED.get(value.dtype, value.dtype))
    return value[place * part : (place + 1) * part].clone() if value.dim() and value.shape[0] == rows else value.clone()
