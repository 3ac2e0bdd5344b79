"""Pipeline stages: the verbs ``cut_pipeline_stage``, ``leaf``, ``cut_evenly`` and ``with_stages``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from attrs import evolve

from ...specs.declaration import D
from ...specs.errors import Problem
from ...specs.json_values import is_integer
from ...specs.pipeline import By, Even
from .selection import module_at, or_unmatched, selected_modules, wrong

if TYPE_CHECKING:
    from torch import nn


def cut_pipeline_stage(sch: D) -> D:
    """End a stage after each selected module."""
    sch = or_unmatched(sch, modules=True)
    paths = [module.path for module in selected_modules(sch)]
    if "" in paths:
        cause = "it is the model itself, and nothing comes after it"
        return wrong(sch, Problem(sch.selected, cause, "Cut a module inside it"))
    return evolve(sch, cuts=tuple(dict.fromkeys((*sch.cuts, *paths))))


def leaf(sch: D) -> D:
    """Mark the selected modules as operations that an export does not follow."""
    sch = or_unmatched(sch, modules=True)
    paths = [module.path for module in selected_modules(sch)]
    if "" in paths:
        cause = "it is the model itself, and a leaf is one operation of one stage"
        return wrong(sch, Problem(sch.selected, cause, "Mark the module that cannot be exported"))
    return evolve(sch, leaves=tuple(dict.fromkeys((*sch.leaves, *paths))))


def cut_evenly(sch: D, num_stages: int, by: By) -> D:
    """Ask for stages that weigh alike."""
    if problem := _wrong_even(num_stages, by):
        return wrong(sch, problem)
    return evolve(sch, even=Even(num_stages, by))


def _wrong_even(num_stages: object, by: object) -> Problem | None:
    """Return a problem if balanced stages are asked for with a wrong number or weight."""
    if not is_integer(num_stages) or num_stages < 1:
        return Problem("cut_evenly", f"num_stages is a positive integer, not {num_stages!r}", "sch.cut_evenly(4)")
    if by not in get_args(By):
        return Problem("cut_evenly", f"stages cannot be balanced by {by!r}", f"There are {', '.join(get_args(By))}")
    return None


def with_stages(sch: D, stages: Sequence[nn.Module]) -> D:
    """Take modules of the model as its stages."""
    names = {id(module_at(sch, module)): module.path for module in sch.modules}
    if problem := _wrong_handed(stages, names):
        return wrong(sch, problem)
    return evolve(sch, handed=tuple((names[id(stage)],) for stage in stages))


def _wrong_handed(stages: object, names: Mapping[int, str]) -> Problem | None:
    """Return a problem if handed-over stages are not distinct modules of the model.

    Args:
        stages: The user's argument.
        names: The paths of the model's modules, by their identities.
    """
    fix = "sch.with_stages([model.first, model.second])"
    if not isinstance(stages, (list, tuple)) or not stages:
        what = "an empty one" if isinstance(stages, (list, tuple)) else f"a {type(stages).__name__}"
        return Problem("with_stages", f"it takes a list of modules, not {what}", fix)
    for stage in stages:
        if id(stage) not in names:
            what = repr(stage) if isinstance(stage, str) else f"a {type(stage).__name__}"
            get = f"Give the module itself: model.get_submodule({stage!r})" if isinstance(stage, str) else fix
            return Problem("with_stages", f"a stage is a module of the model, and this is none: {what}", get)
    paths = [names[id(stage)] for stage in stages]
    for path in paths:
        around = [other for other in paths if other != path and f"{path}.".startswith(f"{other}." if other else "")]
        if around or paths.count(path) > 1:
            other = f"inside {around[0] or '(model)'!r}" if around else "given twice"
            cause = f"a module belongs to one stage, and {path or '(model)'!r} is {other}"
            return Problem("with_stages", cause, "Give each part of the model once")
    return None
