"""Tensors that are whole along ``tensor`` or in parts of different sizes, at a size at which it matters."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from attrs import evolve

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from ....specs.mesh import Coordinate
from ....specs.text_table import ranges
from .vocabulary import is_undivided, is_vocabulary, split
from .whole_experts import experts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.mesh import Mesh, MeshAxis
    from ....specs.param import ParamSpec
    from ....specs.plan import Plan
    from ....specs.shard import Shard

LARGE_BYTES = 16 * 2**20
"""Bytes of a copy from which it is worth a word: norms and biases of the largest models stay below it."""

LARGE_SHARE = 0.01
"""Of what a rank holds: a hundred copies of this part double it."""

IDLE_SHARE = 0.05
"""Of the places that the largest part would give all ranks: the others wait that part of the time of its matrix product."""

IDLE_BYTES = 2**20
"""Bytes of the largest part from which its product takes longer than it takes to start it."""


def large_replicas(plan: Plan) -> Iterator[Finding]:
    """Find large tensors that every rank along ``tensor`` holds alike, with or without the mesh's other axes."""
    num = plan.mesh.tensor
    if num == 1:
        return
    held = _held_bytes(plan)
    for spec in plan.tree.values():
        place = spec.places(plan.mesh)[0]
        size = spec.local_bytes(_first(plan.mesh, place))
        is_large = size >= max(LARGE_BYTES, LARGE_SHARE * held[place])
        told_apart = is_undivided(plan, spec) or (plan.mesh.expert > 1 and experts_of(spec) and not spec.on("expert"))
        if spec.on("tensor") or not is_large or told_apart:
            continue
        share = f"{100 * size / held[place]:.0f} % of what the rank holds"
        cause = f"{spec.type} is whole on all {num} ranks along 'tensor': {human_bytes(size)} on each, {share}"
        yield Finding("SP021", "warning", spec.path, cause, _split(spec, num))


def uneven_parts(plan: Plan) -> Iterator[Finding]:
    """Find tensors of which some ranks have less than others, or nothing."""
    for spec in plan.tree.values():
        for shard in spec.shards:
            size, num = spec.orig_shape[shard.axis], plan.mesh.num(shard.mesh_axis)
            if num == 1 or shard.is_even(size, plan.mesh):
                continue
            lengths = _lengths(shard, size, plan.mesh)
            longest = max(lengths)
            idle = 1 - sum(lengths) / (num * longest)
            is_large = spec.local_bytes(_first(plan.mesh, spec.places(plan.mesh)[0])) >= IDLE_BYTES
            if not is_large or idle < IDLE_SHARE:
                continue
            counts = ", ".join(f"{lengths.count(n)} with {n}" for n in sorted(set(lengths), reverse=True))
            empty = [place for place, length in enumerate(lengths) if not length]
            many = len(empty) > 1
            nothing = f"; place{'s' if many else ''} {ranges(empty)} hold{'' if many else 's'} nothing" if empty else ""
            cause = (
                f"{spec.type} is split over {num} ranks in parts of different sizes: {counts}{nothing}. They wait"
                f" {100 * idle:.0f} % of their time for it"
            )
            yield Finding("SP023", "warning", spec.path, cause, _even(shard, size, num, shard.mesh_axis))


def _split(spec: ParamSpec, num: int) -> str:
    """Return the verb that splits a tensor, as far as its shape and its name tell."""
    fits = [axis for axis, size in enumerate(spec.orig_shape) if size % num == 0]
    if spec.kind != "parameter" or not fits:
        return f"If it has to be whole, sch.at[{spec.path!r}].silence('SP021', reason=...)"
    if is_vocabulary(spec):
        return split(spec)
    if len(spec.orig_shape) == 2:  # noqa: PLR2004  a matrix
        return f"If it is a linear module, sch.at[{spec.module!r}].colwise() or .rowwise()"
    return f"sch.at[{spec.path!r}].shard(axis={fits[0]}), with .sync() where its module's output is joined"


def _even(shard: Shard, size: int, num: int, mesh_axis: MeshAxis) -> str:
    """Return the numbers of ranks that would have equal parts, and the size that would divide."""
    even = evolve(shard, uneven=False, allow_empty=False)
    fewer = max(n for n in range(1, num) if n == 1 or even.misfit(size, n) is None)
    ways = [f"Mesh({mesh_axis}={fewer}) divides it"] if fewer > 1 else []
    if not shard.blocks:
        enough = -(-size // (num * shard.granule)) * num * shard.granule
        ways += ["pad_to_multiple fills it up with zeros"] if shard.axis == 0 and shard.granule == 1 else []
        ways.append(f"a model with {enough} in place of {size} has equal parts")
    text = "; or ".join(ways) or "Blocks that divide have equal parts"
    return text[0].upper() + text[1:]


def _held_bytes(plan: Plan) -> dict[int, int]:
    """Return the bytes of all tensors on the first rank at each place along ``pipe``."""
    held = dict.fromkeys(range(plan.mesh.pipe), 0)
    for spec in plan.tree.values():
        for place in spec.places(plan.mesh):
            held[place] += spec.local_bytes(_first(plan.mesh, place))
    return held


@cache
def _lengths(shard: Shard, size: int, mesh: Mesh) -> tuple[int, ...]:
    """Return the entries that each place along a shard's mesh axis has."""
    places = range(mesh.num(shard.mesh_axis))
    return tuple(shard.length(size, mesh.at(**{shard.mesh_axis: place})) for place in places)


def _first(mesh: Mesh, place: int) -> Coordinate:
    return mesh.at(pipe=place)
