"""Where this process stands on a plan's mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from ...specs.errors import PlanError, Problem
from ...specs.steps import MakeGroups

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.plan import Plan


def stand(plan: Plan) -> tuple[Coordinate, BaseException | None]:
    """Return where this process stands, and what is wrong with the world; then the place is a stand-in."""
    num_ranks = plan.mesh.num_ranks
    if not dist.is_initialized():
        needs_group = any(isinstance(step, MakeGroups) for step in plan.steps) or (plan.pipeline and plan.target)
        if num_ranks == 1 and not needs_group:
            return plan.mesh.coordinate(0), None
        whose = f"{_ranks(num_ranks)}{f' of {plan.target}' if plan.target else ''}"
        cause = f"the plan is for {whose}, and there is no process group"
        fix = f"torchrun --nproc-per-node {num_ranks} ..., and torch.distributed.init_process_group() before execute"
        raise PlanError([Problem("", cause, fix)])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == num_ranks:
        return plan.mesh.coordinate(rank), None
    problem = Problem(
        "", f"the plan is for {_ranks(num_ranks)} ({plan.mesh}), and the process group has {world_size}", "Plan again"
    )
    return plan.mesh.coordinate(rank % num_ranks), PlanError([problem])


def _ranks(num: int) -> str:
    return f"{num} rank{'s' if num > 1 else ''}"
