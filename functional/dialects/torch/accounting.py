"""What torch alone keeps for training (torch 2.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..accounting.local_parameters import LocalParameter, local_parameters, total_bytes
from ..accounting.optimizer import num_states, step_bytes
from ..accounting.records import State

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan


def torch_state(plan: Plan, coordinate: Coordinate) -> State:
    """Return what is kept where nothing stands between the model and the optimizer but DDP.

    An optimizer has states for what has a gradient (``_init_group`` in torch/optim/adam.py and sgd.py).
    """
    parameters = local_parameters(plan, coordinate)
    reached = [parameter for parameter in parameters if parameter.has_gradient]
    return State(
        parameter_bytes=total_bytes(parameters),
        gradient_bytes=total_bytes(reached),
        optimizer_bytes=num_states(plan) * total_bytes(reached) + step_bytes(plan) * len(reached),
        bucket_bytes=total_bytes(averaged(plan, coordinate)),
    )


def averaged(plan: Plan, coordinate: Coordinate) -> list[LocalParameter]:
    """Return the parameters whose gradients DDP averages over ``data``: it has a second copy of each gradient.

    The reducer's buckets are allocated once, for all parameters (``initialize_buckets`` in
    torch/csrc/distributed/c10d/reducer.cpp); gradients are copied into them, as DDP is made without
    ``gradient_as_bucket_view``. Experts that are split are left to the plan.
    """
    if plan.target != "torch" or plan.mesh.data == 1:
        return []
    split = {spec.path for spec in plan.tree.values() if plan.mesh.expert > 1 and spec.on("expert")}
    return [p for p in local_parameters(plan, coordinate) if p.has_gradient and p.spec.path not in split]
