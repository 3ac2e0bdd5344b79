"""What a rank keeps from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..deepspeed.memory import deepspeed_state, heaviest
from ..torch.accounting import torch_state
from .records import State

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan


def heaviest_of(plan: Plan, coordinate: Coordinate, places: range) -> Coordinate:
    """Return the coordinate for which the plan's target keeps the most, of those at some places along ``data``.

    Args:
        plan: The plan.
        coordinate: One of them.
        places: Their places; what they hold of tensors has the same sizes.
    """
    return heaviest(plan, coordinate, places) if plan.target == "deepspeed" else coordinate


def state_of(plan: Plan, coordinate: Coordinate) -> State:
    """Return the bytes that the plan's target keeps for training on one rank.

    Where the target's configuration names no optimizer, its states are not counted. What DeepSpeed puts on the host or on a
    disk (``offload_optimizer``, ``offload_param``) is counted as if it stayed on the device.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> tree = SpecTree([ParamSpec("weight", (16, 4), "float32")])
    >>> config = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_optimization": {"stage": 1}}
    >>> plan = Plan(mesh := Mesh(data=2), tree, (), target="deepspeed", config=config)
    >>> state = state_of(plan, mesh.coordinate(0))
    >>> state.parameter_bytes, state.gradient_bytes, state.optimizer_bytes, state.master_bytes
    (256, 256, 128, 128)
    """
    return deepspeed_state(plan, coordinate) if plan.target == "deepspeed" else torch_state(plan, coordinate)
