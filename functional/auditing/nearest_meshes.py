"""Other meshes on which a plan's tensors fit the devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from math import ceil, isqrt, log2, prod
from typing import TYPE_CHECKING

from attrs import evolve

from ...specs.dtypes import num_bytes
from ...specs.mesh import Mesh
from ...specs.tree import SpecTree
from ..dialects import dialect_of
from .memory import activations_of, memory_at

if TYPE_CHECKING:
    from ...specs.plan import Plan
    from ..dialects import Dialect

_FACTORS = (1, 2, 4, 8)
_FEW = 3


def nearest_meshes(plan: Plan, device_memory: int, ranks_per_node: int | None = None) -> tuple[Mesh, ...]:
    """Return up to three other meshes on which training fits: of as many ranks first, then of 2, 4 and 8 times as many.

    Meshes of one size are ordered by whether groups along ``tensor`` stay within a node, then by the change of ``tensor``.
    Tensors are split as in the plan, so that sizes must divide. A rank's memory is the audit's count for training, with the
    plan's activations, scaled up where fewer ranks share a layer. It is advice for a new plan, not a plan: modules keep the
    local sizes of the old mesh. ``pipe`` stays, as other stages need the model, and so does ``expert``, unless tensors are
    split over it.

    Args:
        plan: A plan, for instance one that is too large.
        device_memory: Bytes of one device.
        ranks_per_node: Ranks that share a node.

    >>> from shardplan.specs import ParamSpec, Plan, Shard
    >>> tree = SpecTree([ParamSpec("up.weight", (1024, 1024), "float32", shards=(Shard(0),))])
    >>> for mesh in nearest_meshes(Plan(Mesh(data=4, tensor=2), tree, ()), device_memory=3 * 2**20):
    ...     print(mesh)
    mesh pipe=1 data=2 tensor=4
    mesh pipe=1 data=1 tensor=8
    mesh pipe=1 data=4 tensor=4
    """
    dialect = dialect_of(plan.target)
    kept = activations_of(plan, dialect)
    stages = [_stage(plan, place) for place in range(plan.mesh.pipe)]
    heaviest = sorted(range(len(stages)), key=lambda place: -_least(stages[place], plan.mesh))

    def fits(mesh: Mesh) -> bool:
        room = [device_memory - ceil(kept.get(place, (0, 0))[0] * _growth(plan, mesh)) for place in heaviest]
        # the cheap test first
        if any(_least(stages[place], mesh) > left for place, left in zip(heaviest, room, strict=True)):
            return False
        return all(_holds(stages[place], dialect, mesh, place, left) for place, left in zip(heaviest, room, strict=True))

    return tuple(islice(filter(fits, _others(plan, ranks_per_node)), _FEW))


def _others(plan: Plan, ranks_per_node: int | None) -> Iterator[Mesh]:
    """Iterate over other meshes that the plan's splits divide, the nearest first."""
    mesh = plan.mesh
    splits = {(spec.orig_shape[shard.axis], shard) for spec in plan.tree.values() for shard in spec.shards}
    spreads = any(shard.mesh_axis == "expert" for _, shard in splits)
    for factor in _FACTORS:
        num = factor * mesh.data * mesh.tensor
        found = [
            evolve(mesh, data=num // tensor, tensor=tensor, expert=expert)
            for tensor in divisors(num)
            for expert in (divisors(num // tensor) if spreads else (mesh.expert,))
            if num // tensor % expert == 0
        ]
        for other in sorted(found, key=lambda other: _distance(mesh, other, ranks_per_node)):
            if other != mesh and not any(shard.misfit(size, other.num(shard.mesh_axis)) for size, shard in splits):
                yield other


def divisors(num: int) -> list[int]:
    """Return all divisors of a number, in order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [n for n in range(1, isqrt(num) + 1) if num % n == 0]
    return [*low, *(num // n for n in reversed(low) if n * n < num)]


def _distance(mesh: Mesh, other: Mesh, ranks_per_node: int | None) -> tuple[bool, float, int]:
    across = ranks_per_node is not None and ranks_per_node % other.tensor > 0
    return across, abs(log2(other.tensor / mesh.tensor)) + abs(log2(other.expert / mesh.expert)), other.tensor


def _stage(plan: Plan, place: int) -> Plan:
    """Return a plan of one stage's tensors."""
    return evolve(plan, tree=SpecTree(spec for spec in plan.tree.values() if place in spec.places(plan.mesh)), steps=())


def _growth(plan: Plan, mesh: Mesh) -> float:
    """Return the factor by which activations may grow where fewer ranks share a layer."""
    return max(1.0, plan.mesh.tensor / mesh.tensor)


def _least(stage: Plan, mesh: Mesh) -> int:
    """Return a lower bound of the first rank's bytes: two bytes an element, divided over all ranks along ``data``."""
    alike = Counter((spec.orig_shape, spec.shards) for spec in stage.tree.values() if spec.kind == "parameter")
    firsts = {(spec.orig_shape, spec.shards): spec for spec in stage.tree.values()}
    here = mesh.coordinate(0)
    wide = (num * prod(firsts[kind].local_shape(here)) for kind, num in alike.items() if num_bytes(firsts[kind].dtype) > 1)
    return 2 * sum(wide) // mesh.data


def _holds(stage: Plan, dialect: Dialect, mesh: Mesh, place: int, room: int) -> bool:
    """Tell whether training fits on a stage: the first rank has the largest part; under ZeRO 2 any rank may have most."""
    there, first = evolve(stage, mesh=mesh), mesh.at(pipe=place)
    return memory_at(there, dialect, first, alike=range(mesh.data)).training_bytes <= room
