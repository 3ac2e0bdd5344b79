"""Collective operators around modules and on gradients: the verbs ``sync``, ``sum_gradient``, ``fork_rng``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeGuard, get_args

from attrs import evolve

from ...specs.declaration import D
from ...specs.errors import Problem
from ...specs.json_values import is_integer
from ...specs.layout_steps import ForkRng, Gives, LayoutStep, ShareRng, SumGradient, SumProducts, Sync, SyncOp, When
from ...specs.mesh import STAGE_AXES, MeshAxis
from ...specs.module import ModuleSpec
from ...specs.paths import join, module_of, name_of
from ..model.callables import register
from .selection import or_unmatched, own_specs, selected_modules, selected_tensors, wrong


def sync(  # noqa: PLR0917  as the verb has them
    sch: D,
    when: When,
    op: SyncOp | Callable[..., object],
    axis: int | None,
    mesh_axis: MeshAxis,
    which: int,
    features: tuple[int, int] | None,
    gives: Gives | None,
) -> D:
    """Send an input or output of the selected modules through a collective operator."""
    sch = or_unmatched(sch, modules=True)
    problem = _wrong_sync(sch.selected, when, op, axis, mesh_axis, which, features)
    if gives is not None and problem is None:
        problem = _wrong_word(sch.selected, when, op) or wrong_gives(sch.selected, gives, axis)
    if problem:
        return wrong(sch, problem)
    if callable(op):
        name, callables = register(sch.runtime.callables, op)
        sch = evolve(sch, runtime=evolve(sch.runtime, callables=callables))
    else:
        name = op
    steps = (Sync(m.path, when, name, axis, mesh_axis, which, features, gives=gives) for m in selected_modules(sch))
    return with_layout(sch, steps)


def _wrong_sync(  # noqa: C901, PLR0911, PLR0917  a return for each mistake
    pattern: str, when: object, op: object, axis: object, mesh_axis: object, which: object, features: object
) -> Problem | None:
    """Return a problem if the arguments of a synchronisation are wrong."""
    if when not in get_args(When):
        return Problem(pattern, f"a sync cannot stand at {when!r}", f"It stands at {', '.join(get_args(When))}")
    if not callable(op) and op not in get_args(SyncOp):
        return Problem(
            pattern, f"sync operator {op!r} is unknown", f"There are {', '.join(get_args(SyncOp))}, or a function"
        )
    if axis is not None and not is_integer(axis):
        return Problem(
            pattern, f"the axis of an activation is an integer, not {axis!r}", f".sync({when!r}, {op!r}, axis=-1)"
        )
    if op in ("all_gather", "reduce_scatter") and axis is None:
        return Problem(pattern, f"{op} needs the axis of the activation", f'.sync({when!r}, "{op}", axis=-1)')
    if op in ("all_reduce", "divide") and axis is not None:
        return Problem(pattern, f"{op} has no axis, and axis={axis} was given", f'.sync({when!r}, "{op}")')
    if op == "divide" and when not in ("forward_pre", "forward_post"):
        return Problem(
            pattern, f"divide is said of an activation, not of a gradient ({when})", '.sync("forward_pre", "divide")'
        )
    if not is_integer(which) or which < 0:
        return Problem(pattern, f"which is a number from 0, not {which!r}", "which=0 is the first floating-point tensor")
    if features is not None:
        if op != "all_reduce" or when not in ("backward_pre", "backward_post"):
            fix = '.sync("backward_pre", "all_reduce", features=(start, stop))'
            return Problem(pattern, "features is for the sum of a gradient", fix)
        if not _is_pair(features) or not 0 <= features[0] < features[1]:
            cause = f"features are the first entry and the one after the last, not {features!r}"
            return Problem(pattern, cause, "features=(512, 576)")
    if mesh_axis not in STAGE_AXES:
        cause = f"a sync cannot run along mesh axis {mesh_axis!r}"
        return Problem(pattern, cause, f"It runs along {' or '.join(STAGE_AXES)}")
    return None


def _wrong_word(pattern: str, when: str, op: object) -> Problem | None:
    """Return a problem if the user gives a word for a collective."""
    if callable(op):
        return None
    cause = f"gives is said of a function of your own, and what {op} gives is known"
    return Problem(pattern, cause, f'.sync("{when}", "{op}", ...) without it')


def wrong_gives(pattern: str, gives: object, axis: object) -> Problem | None:
    """Return a problem if what code gives, in the user's word, is nothing that it can give."""
    if gives not in get_args(Gives):
        return Problem(pattern, f"code does not give {gives!r}", f"It gives {', '.join(map(repr, get_args(Gives)))}")
    if gives == "split" and not is_integer(axis):
        return Problem(pattern, f"gives='split' needs the axis that is split, not {axis!r}", "gives='split', axis=-1")
    return None


def _is_pair(value: object) -> TypeGuard[tuple[int, int]]:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_integer, value))  # noqa: PLR2004  two of them


def sum_gradient(sch: D, name: str | None, mesh_axis: MeshAxis) -> D:
    """Sum the gradients of trained tensors that are whole and work on parts of activations; frozen ones have none."""
    modules, chosen = selected_modules(sch), {path for spec in selected_tensors(sch) for path in spec.paths}
    sch = or_unmatched(sch, modules=name is not None)
    if mesh_axis not in STAGE_AXES:
        cause = f"activations are not split over mesh axis {mesh_axis!r}"
        return wrong(sch, Problem(sch.selected, cause, f"They are over {' or '.join(STAGE_AXES)}"))
    for module in modules:
        owned = {path for spec in own_specs(sch, module) if spec.kind == "parameter" for path in spec.paths}
        mine = {path for path in owned if module_of(path) == module.path}
        found = mine if name is None else mine & {join(module.path, name)}
        if not found:
            held = ", ".join(sorted(mine)) or "none"
            cause = f"it has no parameter{f' {name!r}' if name else ''} of its own"
            sch = wrong(sch, Problem(module.path, cause, f"Its parameters are {held}"))
        chosen |= found
    paths = [path for path in sch.tree.all_paths if path in chosen and sch.tree[path].requires_grad]
    return with_layout(sch, (SumGradient(module_of(path), name_of(path), mesh_axis) for path in paths))


def sum_products(sch: D, what: Literal["outputs", "gradients"]) -> D:
    """Sum products with the selected tensors, or the gradients of what these products take."""
    sch = or_unmatched(sch)
    if what not in {"outputs", "gradients"}:
        return wrong(sch, Problem(sch.selected, f"no {what!r} of products are summed", 'They are "outputs" or "gradients"'))
    chosen = {path for spec in selected_tensors(sch) for path in spec.paths}
    if not chosen:
        cause = "it selects no tensor, and products with tensors are summed"
        sch = wrong(sch, Problem(sch.selected, cause, "Select the tensor itself"))
    paths = [path for path in sch.tree.all_paths if path in chosen]
    return with_layout(sch, (SumProducts(module_of(path), name_of(path), what) for path in paths))


def fork_rng(sch: D) -> D:
    """Draw other random numbers on each rank along ``tensor`` within the selected modules."""
    sch = or_unmatched(sch, modules=True)
    return with_layout(sch, (ForkRng(module.path) for module in selected_modules(sch)))


def share_rng(sch: D, *, onwards: bool) -> D:
    """Draw the same random numbers on all ranks along ``tensor`` within the selected modules, also inside forked modules."""
    sch = or_unmatched(sch, modules=True)
    return with_layout(sch, (ShareRng(module.path, onwards=bool(onwards)) for module in selected_modules(sch)))


def with_syncs(
    sch: D,
    modules: Iterable[ModuleSpec],
    when: When,
    op: SyncOp,
    axis: int | None = None,
    sizes: tuple[int, int] | None = None,
) -> D:
    """Add a synchronisation over ``tensor`` to each module."""
    return with_layout(sch, (Sync(module.path, when, op, axis, sizes=sizes) for module in modules))


def with_layout(sch: D, steps: Iterable[LayoutStep]) -> D:
    """Add layout steps; a step that is there already stays where it is."""
    return evolve(sch, layout=tuple(dict.fromkeys((*sch.layout, *steps))))
