"""What verbs are made of: what a pattern selects, and schedules with one thing more said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Unpack

from attrs import evolve

from ...specs.declaration import D, Declaration
from ...specs.errors import Problem
from ...specs.layout_steps import LayoutStep, SetAttributes, SetToLocalSize, Sync, SyncOp, When
from ...specs.mesh import MeshAxis
from ...specs.module import ModuleSpec
from ...specs.param import Origin, ParamSpec
from ...specs.paths import join, module_of, name_of
from ...specs.pattern import closest, compile_pattern
from ...specs.shard import Shard, Split
from .checks import sharded
from .selection import caller

if TYPE_CHECKING:
    from torch import nn


def selected_modules(sch: Declaration) -> tuple[ModuleSpec, ...]:
    """Return the modules that the pattern selects."""
    if _is_known_wrong(sch):
        return ()
    matches = compile_pattern(sch.selected).fullmatch
    return tuple(m for m in sch.modules if any(map(matches, (m.path, *m.aliases))))


def selected_tensors(sch: Declaration) -> tuple[ParamSpec, ...]:
    """Return the tensors that the pattern itself selects."""
    return () if _is_known_wrong(sch) else sch.tree.select(sch.selected)


def tensors_below(sch: Declaration) -> Iterator[ParamSpec]:
    """Iterate over the selected tensors, and all that selected modules hold, also further down."""
    prefixes = tuple(f"{m.path}." if m.path else "" for m in selected_modules(sch))
    chosen = {spec.path for spec in selected_tensors(sch)}
    return (s for s in sch.tree.values() if s.path in chosen or any(p.startswith(prefixes) for p in s.paths if prefixes))


def module_at(sch: Declaration, module: ModuleSpec) -> nn.Module:
    """Return a module of the model; it is looked at, never changed."""
    return sch.runtime.model.get_submodule(module.path)


def own_tensors(sch: Declaration, module: ModuleSpec) -> tuple[ParamSpec, ...]:
    """Return the tensors that a module holds itself, under any path."""
    return tuple(s for s in sch.tree.values() if any(module_of(path) == module.path for path in s.paths))


def of_kind(
    sch: D, is_kind: Callable[[nn.Module], object], verb: str, kind: str, instead: str
) -> tuple[D, list[ModuleSpec]]:
    """Return the selected modules of a kind, and the schedule with a problem for each other one."""
    sch, found = or_unmatched(sch, modules=True), []
    for module in selected_modules(sch):
        if is_kind(module_at(sch, module)):
            found.append(module)
        else:
            cause = f".{verb}() is for {kind}, and this is a {module.type.partition(':')[2]}"
            sch = wrong(sch, Problem(module.path, cause, f"Spell it out: {instead}"))
    return sch, found


def wrong(sch: D, *problems: Problem) -> D:
    """Return the schedule with problems more."""
    return evolve(sch, problems=(*sch.problems, *problems))


def or_unmatched(sch: D, *, modules: bool = False) -> D:
    """Return the schedule, with a problem if the pattern selects nothing that the verb is for."""
    pattern = sch.selected
    if _is_known_wrong(sch) or selected_modules(sch) or (not modules and selected_tensors(sch)):
        return sch
    if modules and selected_tensors(sch):
        return wrong(sch, Problem(pattern, "it selects tensors, and this verb is for modules", "Drop the tensor's name"))
    near = closest(pattern, [*(m.path for m in sch.modules), *sch.tree.all_paths])
    fix = f"The closest are {', '.join(near)}" if near else "print(model) shows its paths"
    return wrong(sch, Problem(pattern, "no module and no tensor has a path like this", fix))


def with_layout(sch: D, steps: Iterable[LayoutStep]) -> D:
    """Return the schedule with changes of layout more; one that is there already says nothing new."""
    return evolve(sch, layout=tuple(dict.fromkeys((*sch.layout, *steps))))


def with_syncs(
    sch: D,
    modules: Iterable[ModuleSpec],
    when: When,
    op: SyncOp,
    axis: int | None = None,
    sizes: tuple[int, int] | None = None,
) -> D:
    """Return the schedule with a synchronisation over ``tensor`` more for each module."""
    return with_layout(sch, (Sync(module.path, when, op, axis, sizes=sizes) for module in modules))


def edited(sch: D, verb: str, specs: Iterable[ParamSpec], change: Callable[[ParamSpec], ParamSpec]) -> D:
    """Return the schedule with some tensors changed."""
    origin = Origin(verb, sch.selected, caller())
    changed = {s.path: change(s if s.origin else evolve(s, origin=origin)) for s in specs}
    matched = or_unmatched(sch)
    if not changed and matched is sch and not _is_known_wrong(sch):
        matched = wrong(sch, Problem(sch.selected, f"no tensor is there for .{verb}()", "Select a module that holds some"))
    return evolve(matched, tree=sch.tree.replace(changed))


def split_named(
    sch: D,
    verb: str,
    modules: Iterable[ModuleSpec],
    name: str,
    axis: int,
    mesh_axis: MeshAxis = "tensor",
    **split: Unpack[Split],
) -> D:
    """Return the schedule with one tensor of each module split; a module without it is a problem."""
    specs: list[ParamSpec] = []
    for module in modules:
        if (path := join(module.path, name)) in sch.tree:
            specs.append(sch.tree[path])
        else:
            near = [name_of(spec.path) for spec in own_tensors(sch, module)]
            fix = f"It holds {', '.join(near)}" if near else "It holds no tensors itself; its submodules do"
            sch = wrong(sch, Problem(module.path, f"it has no tensor {name!r}", fix))
    return split_tensors(sch, verb, dict.fromkeys(specs), axis, mesh_axis, **split)


def split_tensors(
    sch: D, verb: str, specs: Iterable[ParamSpec], axis: int, mesh_axis: MeshAxis, **split: Unpack[Split]
) -> D:
    """Return the schedule with an axis of tensors split."""
    origin = Origin(verb, sch.selected, caller())
    outcomes = {spec.path: sharded(spec, axis, mesh_axis, origin, split) for spec in specs}
    problems = (outcome for outcome in outcomes.values() if isinstance(outcome, Problem))
    changed = {path: outcome for path, outcome in outcomes.items() if isinstance(outcome, ParamSpec)}
    return evolve(sch, tree=sch.tree.replace(changed), problems=(*sch.problems, *problems))


def with_local_size(sch: D, module: ModuleSpec, attribute: str, tensor: str, axis: int) -> D:
    """Return the schedule in which an attribute that holds the size of an axis has its local value."""
    path = join(module.path, tensor)
    shard = _shard(sch, path, axis)
    size = sch.tree[path].orig_shape[axis] if shard else 0
    if shard is None or shard.misfit(size, sch.mesh.num(shard.mesh_axis)):
        return sch  # a problem already
    if not shard.is_even(size, sch.mesh):
        return with_layout(sch, [SetToLocalSize(module.path, attribute, tensor, axis)])
    return with_layout(sch, [SetAttributes(module.path, {attribute: shard.longest(size, sch.mesh)})])


def joined_sizes(sch: Declaration, path: str, axis: int) -> tuple[int, int] | None:
    """Return the entries of the first rank and of all, where ranks have different numbers of them or some are padding."""
    shard = _shard(sch, path, axis)
    if shard is None:
        return None
    size, num = sch.tree[path].orig_shape[axis], sch.mesh.num(shard.mesh_axis)
    if shard.misfit(size, num) or shard.longest(size, sch.mesh) * num == size:
        return None
    return shard.longest(size, sch.mesh), size


def _shard(sch: Declaration, path: str, axis: int) -> Shard | None:
    spec = sch.tree.get(path)
    return spec and next((shard for shard in spec.shards if shard.axis == axis), None)


def _is_known_wrong(sch: Declaration) -> bool:
    """Whether the pattern itself is a problem already: it selects nothing, and nothing more is said of it."""
    return any(problem.path == sch.selected and not _is_path(sch, problem.path) for problem in sch.problems)


def _is_path(sch: Declaration, pattern: str) -> bool:
    return pattern in sch.tree or any(pattern in (m.path, *m.aliases) for m in sch.modules)
