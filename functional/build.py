"""``build``, ``consolidate_model``, ``init_target_engine``: the entry points of an earlier schedule language."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import evolve

from ..specs.steps import Agree, MakeGroups, MakeOptimizer, Wrap
from .execute import execute
from .interpreter.interpret import interpret
from .interpreter.torch_effects import TorchEffects
from .interpreter.world import own_coordinate
from .model.read import named_tensors
from .plan import plan_build

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from .planning.value_steps import Strategy
    from .schedule import Schedule


def build(
    sch: Schedule,
    target: str | None = None,
    init_weights: bool | Callable[..., object] = True,  # noqa: FBT001, FBT002  as people know it
    *,
    strategy: Literal["auto"] | Strategy = "auto",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    optimizer: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """Plan and execute; return ``model, optimizer``. See ``plan_build`` and ``execute``.

    >>> from torch import nn
    >>> from shardplan.functional import create_schedule
    >>> from shardplan.specs import Mesh
    >>> with torch.device("meta"):
    ...     model = nn.Linear(4, 2)
    >>> model, optimizer = build(create_schedule(model, Mesh()), device="cpu")
    >>> model.weight.shape, optimizer
    (torch.Size([2, 4]), None)
    """
    plan = plan_build(
        sch,
        target=target,
        init_weights=init_weights,
        strategy=strategy,
        seed=seed,
        config=config,
        example_inputs=example_inputs,
    )
    model, made = execute(plan, device=device, optimizer=optimizer)
    return model, made


def consolidate_model(
    sch: Schedule,
    target: str | None = None,
    param_init_fn: Callable[..., object] | None = None,
    *,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Return this rank's module with its shards, not yet handed to a runtime.

    Args:
        sch: The schedule.
        target: Runtime that will take the module later; its demands are checked.
        param_init_fn: The user's init code, ``(module)`` or ``(module, path)``.
        seed: The seed of all random numbers.
        config: The target's configuration; only checked.
        device: The device of all tensors.

    >>> from torch import nn
    >>> from shardplan.functional import create_schedule
    >>> from shardplan.specs import Mesh
    >>> with torch.device("meta"):
    ...     model = nn.Linear(4, 2, bias=False)
    >>> module = consolidate_model(create_schedule(model, Mesh()), param_init_fn=lambda m: m.weight.fill_(3), device="cpu")
    >>> module.weight[0].tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    plan = plan_build(sch, target=target, init_weights=param_init_fn or True, seed=seed, config=config)
    unwrapped = evolve(plan, target=None, config=None, steps=(*plan.steps[:-1], Wrap(None)))
    built = execute(unwrapped, device=device)
    assert built.module is not None, "real effects give a module"
    return built.module


def init_target_engine(
    model: nn.Module,
    target: str,
    *,
    sch: Schedule,
    config: Mapping[str, Any] | None = None,
    optimizer: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """Hand a module from ``consolidate_model`` to a runtime; return ``model, optimizer``.

    Args:
        model: This rank's module; it is used itself, not a copy.
        target: The runtime.
        sch: The schedule of the module: the runtime has to know which tensors are shards.
        config: The target's configuration.
        optimizer: Function from parameters to an optimizer.
    """
    plan = plan_build(sch, target=target, init_weights=False, config=config)
    handing = evolve(plan, steps=[step for step in plan.steps if isinstance(step, (Agree, MakeGroups, MakeOptimizer, Wrap))])
    coordinate, error = own_coordinate(plan)
    device = next((tensor.device for _, _, tensor in named_tensors(model)), torch.device("cpu"))
    effects = TorchEffects(coordinate, device, model, model, plan.runtime.callables, optimizer)
    interpret(handing, coordinate, effects, error=error)
    assert effects.wrapped is not None, "every plan ends with a Wrap step"
    return effects.wrapped.model, effects.wrapped.optimizer
