"""Changes of synchronisations: dropped, doubled, moved, of another kind, axis, mesh axis, operand or order."""

from __future__ import annotations

from typing import get_args

from attrs import evolve

from shardplan.specs.layout_steps import Sync, SyncOp, When
from shardplan.specs.mesh import STAGE_AXES
from tests.mutants.edits import change_steps, chosen, elsewhere, finished, kind

AXES = (0, 1, 2, -1)


def _is_sync(step):
    return isinstance(step, Sync)


@kind("sync dropped")
def _(sch, rng):
    return change_steps(sch, rng, _is_sync, lambda _: [])


@kind("sync doubled")
def _(sch, rng):
    return change_steps(sch, rng, _is_sync, lambda step: [step, step])


@kind("sync moved to another module")
def _(sch, rng):
    near = {}

    def move(step):
        found = near.setdefault("map", elsewhere(sch, rng, step.module))
        known = {module.path for module in sch.modules}
        return [evolve(step, module=found(step.module))] if found and found(step.module) in known else None

    return change_steps(sch, rng, _is_sync, move)


@kind("sync of another operator")
def _(sch, rng):
    op, axis = rng.choice(get_args(SyncOp)), rng.choice(AXES)

    def exchange(step):
        if op == step.op or (op == "divide" and step.when.startswith("backward")):
            return None
        is_along = op in ("all_gather", "reduce_scatter")
        found = (axis if step.axis is None else step.axis) if is_along else None
        return [evolve(step, op=op, axis=found, sizes=None, features=None)]

    return change_steps(sch, rng, _is_sync, exchange)


@kind("sync at another time")
def _(sch, rng):
    when = rng.choice(get_args(When))
    return change_steps(sch, rng, _is_sync, lambda s: None if when == s.when else [evolve(s, when=when, features=None)])


@kind("sync along another axis")
def _(sch, rng):
    axis = rng.choice(AXES)
    is_along = lambda step: _is_sync(step) and step.axis not in {None, axis}  # noqa: E731
    return change_steps(sch, rng, is_along, lambda step: [evolve(step, axis=axis)])


@kind("sync along another mesh axis")
def _(sch, rng):
    def turn(step):
        others = [m for m in STAGE_AXES if m != step.mesh_axis and sch.mesh.num(m) > 1]
        return [evolve(step, mesh_axis=others[0])] if others else None

    return change_steps(sch, rng, _is_sync, turn)


@kind("sync of another operand")
def _(sch, rng):
    which = rng.choice((1, 1, 2))
    return change_steps(sch, rng, _is_sync, lambda step: [evolve(step, which=0 if step.which else which)])


@kind("sync of other entries")
def _(sch, rng):
    features = rng.choice(((0, 2), (0, 8), (1, 4)))

    def limit(step):
        if step.op == "all_reduce" and step.when.startswith("backward"):
            return [evolve(step, features=None if step.features else features)]
        return None if step.sizes is None else [evolve(step, sizes=None)]

    return change_steps(sch, rng, lambda s: _is_sync(s) and limit(s) is not None, limit)


@kind("syncs of a module in another order")
def _(sch, rng):
    pairs = [
        (i, j)
        for i, first in enumerate(sch.layout)
        for j, second in enumerate(sch.layout)
        if i < j and first.module == second.module and _is_sync(first) and _is_sync(second) and first != second
    ]
    if (pair := chosen(rng, pairs)) is None:
        return None
    steps, (i, j) = list(sch.layout), pair
    steps[i], steps[j] = steps[j], steps[i]
    module = steps[i].module
    told = f"{module or '(model)'}: {steps[i].describe()} before {steps[j].describe()}"
    return finished(sch, evolve(sch, layout=tuple(steps)), [module], told)
