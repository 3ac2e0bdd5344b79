"""Plans whose tensors become DTensors, and the splits that a DTensor can express."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from attrs import evolve

from ...specs.errors import PlanError, Problem
from ...specs.mesh import STAGE_AXES, in_mesh_order, whole_of
from ...specs.steps import Agree, AsDTensors, MakeGroups, MakeOptimizer, Step, Wrap

if TYPE_CHECKING:
    from ...specs.intervals import Interval
    from ...specs.mesh import Mesh
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.shard import Shard

_LOCAL = 'execute(plan, layout="local")'
_AFTER = (MakeOptimizer, Wrap)  # the module is complete before these


def as_dtensors(plan: Plan) -> Plan:
    """Return the plan whose ranks hold DTensors at the end, as ``execute(plan, layout="dtensor")`` carries it out.

    Raises:
        PlanError: If DTensors cannot express a tensor's layout, or the target does not take them.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, Shard, SpecTree
    >>> from shardplan.specs.steps import Wrap
    >>> tree = SpecTree([ParamSpec("up.weight", (8, 4), "float32", shards=(Shard(0),))])
    >>> [type(step).__name__ for step in as_dtensors(Plan(Mesh(tensor=2), tree, [Wrap(None)])).steps]
    ['MakeGroups', 'AsDTensors', 'Wrap']
    """
    if problems := [*_wrong_for_dtensors(plan), *(p for s in plan.tree.values() for p in _inexpressible(s, plan.mesh))]:
        raise PlanError(problems)
    steps: list[Step] = [step for step in plan.steps if not isinstance(step, AsDTensors)]
    at = next((n for n, step in enumerate(steps) if isinstance(step, _AFTER) or step == Agree("closing")), len(steps))
    steps.insert(at, AsDTensors(STAGE_AXES))
    made = next((n for n, step in enumerate(steps) if isinstance(step, MakeGroups)), None)
    if made is None:
        steps.insert(int(steps[0] == Agree("opening")), MakeGroups(tuple((mesh_axis,) for mesh_axis in STAGE_AXES)))
    else:
        groups = steps[made]
        assert isinstance(groups, MakeGroups), "it was looked for"
        needed = {*groups.over, *((mesh_axis,) for mesh_axis in STAGE_AXES)}
        steps[made] = evolve(groups, over=tuple(sorted(needed, key=in_mesh_order)))
    return evolve(plan, steps=steps)


def _wrong_for_dtensors(plan: Plan) -> Iterator[Problem]:
    if plan.target is not None:
        cause = f"{plan.target!r} takes local tensors, which it copies into flat buffers of its own, and DTensors are none"
        yield Problem("target", cause, f"{_LOCAL}, or plan with target=None and wrap the module by fully_shard")
    if plan.pipeline or plan.mesh.pipe > 1:
        cause = f"{plan.mesh}: each place along 'pipe' has other tensors, and a DTensor is known to all ranks of its mesh"
        yield Problem("layout", cause, f"{_LOCAL}, or a mesh with pipe=1")


def _inexpressible(spec: ParamSpec, mesh: Mesh) -> Iterator[Problem]:
    """Iterate over the splits of a tensor that are no ``Shard(axis)``, by whose rule place i has chunk i of the axis."""
    for shard in spec.shards:
        if mesh.num(shard.mesh_axis) == 1:
            continue
        over = shard.mesh_axis
        if over not in STAGE_AXES:
            whole = f"a part of {whole_of(over)!r} and no dimension of a device mesh"
            cause = f"axis {shard.axis} is split over {over!r}, which is {whole}"
            yield Problem(spec.path, cause, f"{_LOCAL}, or leave it whole along {over!r}", spec.type)
        elif why := _differs_from_chunks(spec.orig_shape[shard.axis], shard, mesh):
            cause, fix = why
            yield Problem(spec.path, cause, f"{_LOCAL}, or {fix}", spec.type)


def _differs_from_chunks(size: int, shard: Shard, mesh: Mesh) -> tuple[str, str] | None:
    """Return how a split differs from the rule of ``torch.chunk``, and a fix; None if it does not."""
    num, along = mesh.num(shard.mesh_axis), f"along {shard.mesh_axis!r}"
    group = [mesh.coordinate(rank) for rank in mesh.groups(shard.mesh_axis)[0]]
    parts = [shard.intervals(size, here) for here in group]
    lengths = [shard.length(size, here) for here in group]
    step = -(-size // num)
    bounds = [(min(place * step, size), min((place + 1) * step, size)) for place in range(num)]
    chunks = [((start, stop),) if start < stop else () for start, stop in bounds]
    if lengths != [sum(stop - start for start, stop in part) for part in parts]:
        cause = f"axis {shard.axis} has {size} entries, padded to {sum(lengths)}, and a DTensor has no padding"
        return cause, f"give the model itself {sum(lengths)} entries"
    if any(held.num_holders > 1 for here in group for held in shard.held(size, here)):
        cause = f"axis {shard.axis} has granules that several ranks {along} hold, and by DTensor's rule each has others"
        return cause, f"have fewer ranks {along}"
    for place, (part, chunk) in enumerate(zip(parts, chunks, strict=True)):
        if len(part) > 1:
            cause = (
                f"place {place} {along} has entries {_entries(part)} of axis {shard.axis}, and by DTensor's rule one piece"
            )
            return cause, "make each block a tensor of its own"
        if part != chunk:
            cause = f"place {place} {along} has entries {_entries(part)} of axis {shard.axis}"
            count = size // shard.granule
            fix = f"have a number of ranks {along} that divides {count} granules"
            return f"{cause}, and by DTensor's rule {_entries(chunk)}", fix
    return None


def _entries(part: Sequence[Interval]) -> str:
    """Write some of the entries of an axis.

    >>> _entries([(0, 16), (32, 36), (40, 44)])
    '0 to 16, 32 to 36, ...'
    """
    shown = [f"{start} to {stop}" for start, stop in part[:2]]
    return ", ".join([*shown, *(["..."] if len(part) > len(shown) else [])]) or "none"
