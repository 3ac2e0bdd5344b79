"""Splits of tensors along an axis: the verb ``shard``, and attributes that hold local sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

from attrs import evolve

from ...specs.declaration import D, Declaration
from ...specs.errors import Problem
from ...specs.json_values import is_integer
from ...specs.layout_steps import SetAttributes, SetToLocalSize
from ...specs.mesh import SPLIT_AXES, MeshAxis, factors, whole_of
from ...specs.module import ModuleSpec
from ...specs.param import Origin, ParamSpec
from ...specs.paths import join, name_of
from ...specs.shard import Shard, Split
from .selection import caller, or_unmatched, own_specs, selected_modules, selected_tensors, wrong
from .syncs import with_layout

_OPTIONS = "Options are blocks=(n, ...), interleaved=n, granule=n, replicate, uneven, allow_empty, pad_to_multiple=n"


def shard(sch: D, name: str | None, axis: int, mesh_axis: MeshAxis, **split: Unpack[Split]) -> D:
    """Split the selected tensors, or the tensor of this name in each selected module."""
    sch = or_unmatched(sch, modules=name is not None)
    if name is not None:
        return split_named(sch, "shard", selected_modules(sch), name, axis, mesh_axis, **split)
    specs = selected_tensors(sch)
    if not specs and selected_modules(sch):
        cause = "it selects modules, and .shard(axis=...) is for tensors"
        return wrong(sch, Problem(sch.selected, cause, f'Name the tensor: .shard("weight", axis={axis})'))
    return split_tensors(sch, "shard", specs, axis, mesh_axis, **split)


def split_named(
    sch: D,
    verb: str,
    modules: Iterable[ModuleSpec],
    name: str,
    axis: int,
    mesh_axis: MeshAxis = "tensor",
    **split: Unpack[Split],
) -> D:
    """Split the tensor of this name in each module; a module without it is a problem."""
    specs: list[ParamSpec] = []
    for module in modules:
        if (path := join(module.path, name)) in sch.tree:
            specs.append(sch.tree[path])
        else:
            near = [name_of(spec.path) for spec in own_specs(sch, module)]
            fix = f"It holds {', '.join(near)}" if near else "It holds no tensors itself; its submodules do"
            sch = wrong(sch, Problem(module.path, f"it has no tensor {name!r}", fix))
    return split_tensors(sch, verb, dict.fromkeys(specs), axis, mesh_axis, **split)


def split_tensors(
    sch: D, verb: str, specs: Iterable[ParamSpec], axis: int, mesh_axis: MeshAxis, **split: Unpack[Split]
) -> D:
    """Split an axis of tensors."""
    origin = Origin(verb, sch.selected, caller())
    outcomes = {spec.path: _sharded(spec, axis, mesh_axis, origin, split) for spec in specs}
    problems = (outcome for outcome in outcomes.values() if isinstance(outcome, Problem))
    changed = {path: outcome for path, outcome in outcomes.items() if isinstance(outcome, ParamSpec)}
    return evolve(sch, tree=sch.tree.replace(changed), problems=(*sch.problems, *problems))


def _sharded(  # noqa: PLR0911  a return for each mistake
    spec: ParamSpec, axis: int, mesh_axis: MeshAxis, origin: Origin, split: Split
) -> ParamSpec | Problem:
    """Return a tensor with a further split, or why it cannot have it; the same split twice changes nothing."""
    rank = len(spec.orig_shape)
    if not is_integer(axis) or not -rank <= axis < rank:
        fix = f"Its axes are 0 to {rank - 1}" if rank else "It is a scalar"
        return Problem(spec.path, f"it has no axis {axis!r}", fix, spec.type)
    if mesh_axis not in ("pipe", *SPLIT_AXES):
        return Problem(spec.path, f"mesh axis {mesh_axis!r} is unknown", f"There are {', '.join(SPLIT_AXES)}", spec.type)
    if unknown := sorted(set(split) - set(Split.__annotations__)):
        fix = f"There are {', '.join(Split.__annotations__)}"
        return Problem(spec.path, f"a split has no {', '.join(map(repr, unknown))}", fix, spec.type)
    try:
        shard = Shard(axis % rank, mesh_axis, **split)
    except (TypeError, ValueError) as error:
        text = str(error.args[0]) if error.args else str(error)
        return Problem(spec.path, f"it cannot be split so: {text}", _OPTIONS, spec.type)
    if shard in spec.shards:
        return spec
    first = next((s for s in spec.shards if s.axis == shard.axis or s.mesh_axis == mesh_axis), None)
    if first is None:
        first = next((s for s in spec.shards if set(factors(s.mesh_axis)) & set(factors(mesh_axis))), None)
    if first is not None:
        cause = (
            f"it is split twice: along axis {first.axis} over {first.mesh_axis!r} ({spec.origin}),"
            f" and along axis {shard.axis} over {shard.mesh_axis!r} ({origin})"
        )
        tied = f" It is one tensor with {', '.join(spec.tie)}." if spec.tie else ""
        return Problem(spec.path, cause, f"{_keep(first, shard)}.{tied}", spec.type)
    return spec.shard(shard, origin)


def _keep(first: Shard, second: Shard) -> str:
    for part, whole in ((first.mesh_axis, second.mesh_axis), (second.mesh_axis, first.mesh_axis)):
        if part != whole == whole_of(part):
            return f"Keep one of them: {part!r} is a part of {whole!r}"
    return "Keep one of them"


def with_local_size(sch: D, module: ModuleSpec, attribute: str, tensor: str, axis: int) -> D:
    """Set an attribute that holds the size of an axis to its local value."""
    path = join(module.path, tensor)
    shard = _shard_along(sch, path, axis)
    size = sch.tree[path].orig_shape[axis] if shard else 0
    if shard is None or shard.misfit(size, sch.mesh.num(shard.mesh_axis)):
        return sch  # a problem already
    if not shard.is_even(size, sch.mesh):
        return with_layout(sch, [SetToLocalSize(module.path, attribute, tensor, axis)])
    return with_layout(sch, [SetAttributes(module.path, {attribute: shard.longest(size, sch.mesh)})])


def joined_sizes(sch: Declaration, path: str, axis: int) -> tuple[int, int] | None:
    """Return the sizes of the first rank's part and of the whole axis; None if all parts are equal and unpadded."""
    shard = _shard_along(sch, path, axis)
    if shard is None:
        return None
    size, num = sch.tree[path].orig_shape[axis], sch.mesh.num(shard.mesh_axis)
    if shard.misfit(size, num) or shard.longest(size, sch.mesh) * num == size:
        return None
    return shard.longest(size, sch.mesh), size


def _shard_along(sch: Declaration, path: str, axis: int) -> Shard | None:
    spec = sch.tree.get(path)
    return spec and next((shard for shard in spec.shards if shard.axis == axis), None)
