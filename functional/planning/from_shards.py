"""Plans that start from files of single ranks, which replace all other sources of values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from ...specs.errors import PlanError, Problem
from ...specs.plan import Plan
from ...specs.source import Loaded, Materialised, Uninitialised
from ...specs.steps import (
    Allocate,
    Broadcast,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    LoadOwn,
    LoadShard,
    Place,
    Scatter,
    SendCopy,
    Slice,
    Step,
    TakeShard,
    TakeWhole,
)
from ...specs.stored import Folder

if TYPE_CHECKING:
    from ...specs.param import ParamSpec
    from ...specs.tree import SpecTree

_VALUE_STEPS = (
    *(Allocate, Broadcast, EvaluateShard, EvaluateWhole, Generate, LoadOwn, LoadShard, Place),
    *(Scatter, SendCopy, Slice, TakeShard, TakeWhole),
)


def from_shards(plan: Plan, folder: str | Path) -> Plan:
    """Return the plan that starts from files written by ``materialize``: each rank reads its own, and nothing is sent.

    Args:
        plan: The plan that the files were written for.
        folder: Where they lie when the plan is executed.

    Raises:
        PlanError: If the plan starts from such files already.

    >>> from shardplan.specs import InitProgram, Mesh, ParamSpec, Plan, SpecTree
    >>> from shardplan.specs.steps import EvaluateShard, Place
    >>> tree = SpecTree([ParamSpec("weight", (4, 4), "float32", source=InitProgram(()))])
    >>> plan = Plan(Mesh(), tree, [EvaluateShard(0, ("weight",)), Place(0, ("weight",))])
    >>> [type(step).__name__ for step in from_shards(plan, "shards").steps]
    ['LoadOwn', 'Place']
    """
    if not isinstance(plan, Plan):
        msg = f"from_shards takes the plan of the files, not a {type(plan).__name__}: from_shards(plan, folder)"
        raise TypeError(msg)
    if any(isinstance(spec.source, Materialised) for spec in plan.tree.values()):
        raise PlanError([Problem("", "the plan starts from such files already", "Give the plan that they were written for")])
    tree = plan.tree.map(lambda spec: _materialised(spec, plan))
    steps: list[Step] = []
    is_done = False
    for step in plan.steps:
        if not isinstance(step, _VALUE_STEPS):
            steps.append(step)
        elif not is_done:
            steps += _load_steps(plan, tree)
            is_done = True
    return evolve(plan, tree=tree, steps=steps, folder=Folder(str(folder), ()))


def _materialised(spec: ParamSpec, plan: Plan) -> ParamSpec:
    match spec.source:
        case Uninitialised():
            return spec
        case Loaded(parts=parts):
            return evolve(spec, source=Materialised(plan.fingerprint, parts))
        case _:
            return evolve(spec, source=Materialised(plan.fingerprint))


def _load_steps(plan: Plan, tree: SpecTree) -> Iterator[Step]:
    for at in range(plan.mesh.pipe):
        held = [spec for spec in tree.values() if at in spec.places(plan.mesh)]
        bare = tuple(spec.path for spec in held if isinstance(spec.source, Uninitialised))
        own = tuple(spec.path for spec in held if not isinstance(spec.source, Uninitialised))
        if own:
            yield LoadOwn(at, own)
        if bare:
            yield Allocate(at, bare)
        if held:
            yield Place(at, own + bare)
