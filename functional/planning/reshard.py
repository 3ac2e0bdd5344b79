"""From one plan to another: each message between ranks, proven complete."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from ...specs.errors import PlanError, Problem
from ...specs.index import index_shape
from ...specs.ownership import local_boxes
from ...specs.plan import Plan
from ...specs.resharding import Reshard
from ..checkpoints.assembly import miscovered_by_boxes

if TYPE_CHECKING:
    from ...specs.index import Index
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec


def reshard(source: Plan, target: Plan) -> Reshard:
    """Return the messages between ranks that turn the layout of a plan into the layout of another.

    For each kind of tensor and of rank it is proven that the rank gets each element of its part once, from a rank that
    holds it. The time is proportional to the number of these kinds.

    Args:
        source: The plan that was executed.
        target: A plan of the same tensors on another mesh, or with other splits.

    Raises:
        PlanError: If the tensors are not the same, all at once.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, Shard, SpecTree
    >>> tree = SpecTree([ParamSpec("weight", (8, 4), "float32", shards=(Shard(0),))])
    >>> resharding = reshard(Plan(Mesh(tensor=2), tree, ()), Plan(Mesh(tensor=4), tree, ()))
    >>> [(move.source, move.target, move.index[0]) for move in resharding.sends(0)]
    [(0, 1, ((2, 4),))]
    """
    for plan in (source, target):
        if not isinstance(plan, Plan):
            msg = f"reshard takes two plans, not a {type(plan).__name__}: reshard(plan_a, plan_b)"
            raise TypeError(msg)
    problems = list(_differences(source, target))
    if problems:
        raise PlanError(problems)
    found = Reshard(source, target)
    for (path, *_), (rank, *_) in found.kinds():
        _prove(found, path, target.mesh.coordinate(rank))
    return found


def _differences(source: Plan, target: Plan) -> Iterator[Problem]:
    """Iterate over the differences between the tensors of two plans."""
    for spec in target.tree.values():
        before = source.tree.get(spec.path)
        if before is None or before.path != spec.path:
            yield Problem(spec.path, "the target has it, and the source has not", "Plan the same model", spec.type)
        elif before.orig_shape != spec.orig_shape:
            cause = f"it is {list(before.orig_shape)} in the source, and {list(spec.orig_shape)} in the target"
            yield Problem(spec.path, cause, "Plan the same model", spec.type)
        elif before.dtype != spec.dtype:
            cause = f"it is {before.dtype} in the source, and {spec.dtype} in the target"
            fix = "Go by files, which convert it: save_checkpoint, then init_weights=Checkpoint(folder)"
            yield Problem(spec.path, cause, fix, spec.type)
        elif set(before.tie) != set(spec.tie):
            yield Problem(spec.path, "it is tied to other tensors in the source", "Plan the same model", spec.type)
    for spec in source.tree.values():
        if spec.path not in target.tree:
            yield Problem(spec.path, "the source has it, and the target has not", "Plan the same model", spec.type)


def _prove(resharding: Reshard, path: str, here: Coordinate) -> None:
    """Raise AssertionError unless a rank gets each element of its part once, from a rank that holds it."""
    before, after = resharding.source.tree[path], resharding.target.tree[path]
    moves = list(resharding.of(path, here.rank))
    boxes = [box for move in moves for _, box in local_boxes(after, here, move.index)]
    fault = miscovered_by_boxes(index_shape(after.index(here)), boxes)
    assert fault is None, f"{after}: rank {here.rank} gets {moves}, which is not what it holds"
    for move in moves:
        sender = resharding.source.mesh.coordinate(move.source)
        assert _has(before, sender, move.index), f"{after}: rank {move.source} is to send {move.index}, which it has not"


def _has(spec: ParamSpec, here: Coordinate, index: Index) -> bool:
    if here.pipe not in spec.places(here.mesh):
        return False
    held = sum(prod(stop - start for start, stop in own) for _, own in local_boxes(spec, here, index))
    return held == prod(index_shape(index))
