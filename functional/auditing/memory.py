"""Memory of the ranks at each distinct coordinate, while the plan is executed and while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ...specs.memory import Memory, Share
from ...specs.source import ModuleValues, OwnValues
from .module_tree import stages_of

if TYPE_CHECKING:
    from ...specs.distinct_ranks import Distinct
    from ...specs.mesh import Coordinate
    from ...specs.plan import Plan
    from ..dialects import Dialect


def shares(plan: Plan, dialect: Dialect, distinct: Distinct, executing: Mapping[Coordinate, int]) -> Iterator[Share]:
    """Iterate over the memory of ranks, in their order; of ranks that hold the same tensors, of the fullest.

    Args:
        plan: The plan.
        dialect: The dialect of its target.
        distinct: Which ranks are alike.
        executing: Peak bytes while the plan is executed, for each distinct coordinate.
    """
    activations = activations_of(plan, dialect)
    for here, num_ranks in distinct.places():
        memory = memory_at(plan, dialect, here, distinct.alike(here), executing[here], activations.get(here.pipe))
        yield Share(here, num_ranks, memory)


def memory_at(
    plan: Plan,
    dialect: Dialect,
    here: Coordinate,
    alike: range | None = None,
    executing_bytes: int = 0,
    activations: tuple[int, int] | None = None,
) -> Memory:
    """Return the memory of the rank at a coordinate.

    Args:
        plan: The plan.
        dialect: The dialect of its target.
        here: The rank's coordinate.
        alike: Places along ``data`` whose ranks hold the same tensors; if given, the memory of the fullest of them.
        executing_bytes: Peak bytes while the plan is executed, by its receipt.
        activations: Bytes that autograd keeps, and that it keeps with checkpoints; None if they are not known.
    """
    mine = [spec for spec in plan.tree.values() if here.pipe in spec.places(plan.mesh)]
    state = dialect.state(plan, here, alike)
    return Memory(
        parameter_bytes=state.parameter_bytes,
        buffer_bytes=sum(spec.local_bytes(here) for spec in mine if spec.kind != "parameter"),
        gradient_bytes=state.gradient_bytes,
        optimizer_bytes=state.optimizer_bytes,
        master_bytes=state.master_bytes,
        bucket_bytes=state.bucket_bytes,
        boundary_bytes=state.boundary_bytes,
        activation_bytes=activations[0] if activations else None,
        checkpointed_bytes=activations[1] if activations else None,
        executing_bytes=executing_bytes,
        host_bytes=sum(s.num_bytes for s in plan.tree.values() if isinstance(s.source, (ModuleValues, OwnValues))),
        replicated_bytes=sum(spec.num_bytes for spec in mine if not spec.mesh_axes(here)),
    )


def activations_of(plan: Plan, dialect: Dialect) -> dict[int, tuple[int, int]]:
    """Return for each place along ``pipe`` the bytes that autograd keeps, and that it keeps with each block checkpointed.

    A checkpoint keeps a block's inputs; while a block is recomputed, autograd keeps all of that block's activations again
    (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).
    """
    if plan.microbatch is None:
        return {}
    kept, inputs, largest = ([0] * max(plan.mesh.pipe, len(plan.stages)) for _ in range(3))
    stage_of = stages_of(plan, [saved.module for saved in plan.microbatch.saved])
    for saved in plan.microbatch.saved:
        stage = stage_of[saved.module] if saved.module else -1  # the model's own last computation is its loss
        kept[stage] += saved.saved_bytes
        inputs[stage] += saved.input_bytes if saved.is_block else saved.saved_bytes
        largest[stage] = max(largest[stage], saved.saved_bytes if saved.is_block else 0)
    found: dict[int, tuple[int, int]] = {}
    for stage in range(len(kept)):
        place, num = stage % plan.mesh.pipe, dialect.in_flight(plan, stage)
        before = found.get(place, (0, 0))
        found[place] = before[0] + num * kept[stage], before[1] + num * inputs[stage] + largest[stage]
    return found
