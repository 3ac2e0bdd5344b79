"""Fill a copy of a model for one rank, as a plan says, without the agreement of all ranks and without a runtime."""

from __future__ import annotations

import torch
from attrs import evolve
from torch import nn

from ...specs.mesh import Coordinate
from ...specs.plan import Plan
from ...specs.steps import Agree, MakeOptimizer, Wrap
from ..interpreter.interpret import interpret
from ..interpreter.torch_effects import TorchEffects
from ..model.copy import copy_module, on_meta


def filled(plan: Plan, coordinate: Coordinate, model: nn.Module) -> TorchEffects:
    """Return the effects of a plan on one rank, which hold its modules.

    Args:
        plan: The plan.
        coordinate: Where the rank stands; its thread has process groups if the plan needs some.
        model: The planned model; it is not changed.
    """
    steps = [step for step in plan.steps if not isinstance(step, (Agree, MakeOptimizer, Wrap))]
    copied, callables = copy_module(model, on_meta, for_planning=False), plan.runtime.callables
    effects = TorchEffects(coordinate, torch.device("cpu"), model, copied, callables, partition=plan.runtime.partition)
    interpret(evolve(plan, steps=steps), coordinate, effects)
    return effects
