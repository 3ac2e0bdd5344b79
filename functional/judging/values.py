"""A copy of a model in double precision, with random values that hide nothing: no zeros, no equal rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...specs.errors import PlanError
from ...specs.mesh import Mesh
from ..model.copy import copy_module, get_tensor
from ..model.read import named_tensors, read_tensors
from ..model.rng_state import derive_seed
from ..plan import plan_build
from ..schedule import create_schedule
from .exact import LIFTED
from .filling import filled


def random_copy(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model on the CPU in double precision, with values of its own init code, varied at random.

    Zeros become normal numbers, equal entries differ by up to a half, further values by up to a fifth; matrices keep the
    size of their inputs. Integers stay as they are.

    Args:
        model: The model, also on the meta device; it is not changed.
        seed: The seed of the values, which depend on a tensor's path too.
    """
    copied = copy_module(_filled(model), _in_double, for_planning=False)
    for module in copied.modules():
        _lift_attributes(module)
    tree, _ = read_tensors(copied)
    with torch.no_grad():
        for spec in tree.values():
            tensor = get_tensor(copied, spec.path)
            numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if numbers.is_floating_point() and numbers.numel():
                generator = torch.Generator().manual_seed(derive_seed(seed, spec.path))
                numbers.copy_(_varied(numbers, generator, is_trained=spec.kind == "parameter"))
    return copied


def _filled(model: nn.Module) -> nn.Module:
    """Return the model, or a copy with values if it has none."""
    if not any(tensor.is_meta for _, _, tensor in named_tensors(model)):
        return model
    sch = create_schedule(model, Mesh())
    try:
        plan = plan_build(sch)
    except PlanError:  # init code is missing, or cannot be followed: all values are random then
        plan = plan_build(sch, init_weights=_fill)
    return filled(plan, plan.mesh.coordinate(0), model).module


def _fill(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data.fill_(1.0)
        else:
            tensor.data.zero_()


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", LIFTED.get(tensor.dtype, tensor.dtype), copy=True)


def _lift_attributes(module: nn.Module) -> None:
    """Let tensors in plain attributes of a module be in double precision too."""
    if isinstance(module, torch.jit.ScriptModule):
        module.double()
        return
    for name, value in list(vars(module).items()):
        if name not in ("_parameters", "_buffers", "_modules"):
            vars(module)[name] = _lifted(value)


def _lifted(value: Any) -> Any:
    match value:
        case Tensor() if value.dtype in LIFTED and not isinstance(value, nn.Parameter):
            return value.to(LIFTED[value.dtype])
        case list() | tuple() if type(value) in (list, tuple):
            lifted = [_lifted(item) for item in value]
            return type(value)(lifted) if any(a is not b for a, b in zip(lifted, value, strict=True)) else value
        case dict() if type(value) is dict:
            lifted = {key: _lifted(item) for key, item in value.items()}
            return lifted if any(lifted[key] is not item for key, item in value.items()) else value
        case _:
            return value


def _varied(tensor: Tensor, generator: torch.Generator, *, is_trained: bool) -> Tensor:
    """Return values like those of a tensor, which no two entries share."""
    spread = (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5).to(tensor.dtype)
    if not is_trained and bool(tensor.isinf().any()) and not bool(tensor.isnan().any()):
        return tensor  # a mask
    found = tensor if bool(tensor.isfinite().all()) else torch.ones_like(tensor)
    if bool((found == found.reshape(-1)[0]).all()):
        is_zero = bool(found.reshape(-1)[0] == 0)
        if is_trained and (is_zero or tensor.dim() > 1):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            return noise * _scale(tensor)
        return spread if is_zero else found * (1 + spread)  # such as a running mean, or a norm's weight
    varied = torch.where(found == 0, spread * found.std(), found * (1 + 0.4 * spread))  # a row of padding is zero
    if is_trained and tensor.dim() > 1:
        return varied * (_scale(tensor) / varied.std().clamp(min=1e-6))
    return varied if is_trained else found


def _scale(tensor: Tensor) -> float:
    """Return the standard deviation with which a matrix keeps the size of what it multiplies."""
    return float(tensor.shape[-1] * tensor.shape[-2]) ** -0.25 if tensor.dim() > 1 else 0.3
