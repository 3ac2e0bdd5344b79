"""What the ranks of each distinct coordinate hold, while the plan is executed and while it trains. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ...specs.memory import Memory, Share
from ...specs.source import ModuleValues, OwnValues
from ..dialects.accounting.boundary_memory import boundary_bytes
from ..dialects.accounting.pipeline_schedules import in_flight
from ..dialects.accounting.state import heaviest_of, state_of
from .stage_of_module import stages_of

if TYPE_CHECKING:
    from ...specs.distinct_ranks import Distinct
    from ...specs.mesh import Coordinate
    from ...specs.plan import Plan


def shares(plan: Plan, distinct: Distinct, executing: Mapping[Coordinate, int]) -> Iterator[Share]:
    """Iterate over what ranks hold, in the order of ranks.

    Args:
        plan: The plan.
        distinct: Which ranks are alike.
        executing: For each distinct coordinate the most bytes at one time while the plan is executed.
    """
    activations = activations_of(plan)
    for here, num_ranks in distinct.places():
        worst = heaviest_of(plan, here, distinct.alike(here))
        yield Share(here, num_ranks, memory_at(plan, worst, executing[here], activations.get(here.pipe)))


def memory_at(plan: Plan, here: Coordinate, executing_bytes: int = 0, activations: tuple[int, int] | None = None) -> Memory:
    """Return what the rank at a coordinate holds.

    Args:
        plan: The plan.
        here: Where it stands.
        executing_bytes: The most bytes at one time while the plan is executed, as its receipt says.
        activations: What autograd keeps, and what it keeps with checkpoints; None if it is not known.
    """
    mine = [spec for spec in plan.tree.values() if here.pipe in spec.places(plan.mesh)]
    state = state_of(plan, here)
    return Memory(
        parameter_bytes=state.parameter_bytes,
        buffer_bytes=sum(spec.local_bytes(here) for spec in mine if spec.kind != "parameter"),
        gradient_bytes=state.gradient_bytes,
        optimizer_bytes=state.optimizer_bytes,
        master_bytes=state.master_bytes,
        bucket_bytes=state.bucket_bytes,
        boundary_bytes=boundary_bytes(plan, here),
        activation_bytes=activations[0] if activations else None,
        checkpointed_bytes=activations[1] if activations else None,
        executing_bytes=executing_bytes,
        host_bytes=sum(s.num_bytes for s in plan.tree.values() if isinstance(s.source, (ModuleValues, OwnValues))),
        replicated_bytes=sum(spec.num_bytes for spec in mine if not spec.mesh_axes(here)),
    )


def activations_of(plan: Plan) -> dict[int, tuple[int, int]]:
    """Return for each place along ``pipe`` what autograd keeps, and what it keeps where each block is checkpointed.

    A checkpoint keeps a block's inputs; while a block is computed again all that autograd keeps of it is there once more
    (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).
    """
    if plan.microbatch is None:
        return {}
    kept, inputs, largest = ([0] * max(plan.mesh.pipe, len(plan.stages)) for _ in range(3))
    stage_of = stages_of(plan, [saved.module for saved in plan.microbatch.saved])
    for saved in plan.microbatch.saved:
        stage = stage_of[saved.module] if saved.module else -1  # what the model itself computes last is its loss
        kept[stage] += saved.saved_bytes
        inputs[stage] += saved.input_bytes if saved.is_block else saved.saved_bytes
        largest[stage] = max(largest[stage], saved.saved_bytes if saved.is_block else 0)
    found: dict[int, tuple[int, int]] = {}
    for stage in range(len(kept)):
        place, num = stage % plan.mesh.pipe, in_flight(plan, stage)
        before = found.get(place, (0, 0))
        found[place] = before[0] + num * kept[stage], before[1] + num * inputs[stage] + largest[stage]
    return found
