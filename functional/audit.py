"""The audit: what each rank will hold, send and risk, read off the steps that will run. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..specs.mesh import Coordinate
from ..specs.plan import Plan
from ..specs.report import Boundary, Report, Share, Traffic
from .dry import DryEffects
from .findings import find
from .interpret import interpret

if TYPE_CHECKING:
    from ..specs.pipeline import Stage
    from ..specs.receipt import Receipt


def audit(plan: Plan) -> Report:
    """Return what a plan means for each rank, without running it: no device, no process group, no torch.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> report = audit(Plan(Mesh(), SpecTree([ParamSpec("weight", (4, 4), "float32")]), steps=()))
    >>> report.ok, report.shares[0].parameter_bytes
    (True, 64)
    """
    if not isinstance(plan, Plan):
        msg = f"audit takes a plan, not a {type(plan).__name__}: audit(plan_build(schedule))"
        raise TypeError(msg)
    mesh = plan.mesh
    shards = [(spec.orig_shape[shard.axis], shard) for spec in plan.tree.values() for shard in spec.shards]
    is_even = all(shard.is_even(size, mesh) for size, shard in shards)
    distinct = {
        (stage, data, tensor): predict(plan, mesh.rank(Coordinate(pipe=stage, data=data, tensor=tensor, mesh=mesh)))
        for stage in range(mesh.pipe)
        for data in range(min(mesh.data, 2) if is_even else mesh.data)
        for tensor in range(min(mesh.tensor, 2) if is_even else mesh.tensor)
    }  # where parts are equal, places past the second are like it: only the first sends
    return Report(
        title=f"audit of plan {plan.fingerprint[:12]}, {mesh}, target={plan.target or 'none'}",
        mesh=mesh,
        shares=tuple(_share(plan, stage, tensor, distinct) for stage in range(mesh.pipe) for tensor in range(mesh.tensor)),
        traffic=tuple(row for stage in range(mesh.pipe) for row in _traffic(stage, distinct[stage, 0, 0])),
        replicated=_replicated(plan),
        findings=tuple(find(plan)),
        boundaries=tuple(_boundary(number, stage) for number, stage in enumerate(plan.stages[:-1])),
    )


def predict(plan: Plan, rank: int) -> Receipt:
    """Return the receipt that a rank will give, by running the interpreter with effects that only keep the books.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> from shardplan.specs.steps import Allocate, Place
    >>> tree = SpecTree([ParamSpec("weight", (4, 4), "float32")])
    >>> predict(Plan(Mesh(data=64), tree, [Allocate(0, ("weight",)), Place(0, ("weight",))]), rank=17).held_bytes
    64
    """
    effects = DryEffects(rank)
    interpret(plan, plan.mesh.coordinate(rank), effects)
    return effects.ledger.receipt(rank)


def _share(plan: Plan, stage: int, tensor: int, distinct: dict[tuple[int, int, int], Receipt]) -> Share:
    here = Coordinate(pipe=stage, data=0, tensor=tensor, mesh=plan.mesh)
    mine = [spec for spec in plan.tree.values() if stage in spec.places(plan.mesh)]
    return Share(
        stage=stage,
        tensor=tensor,
        parameter_bytes=sum(spec.local_bytes(here) for spec in mine if spec.kind == "parameter"),
        buffer_bytes=sum(spec.local_bytes(here) for spec in mine if spec.kind != "parameter"),
        replicated_bytes=sum(spec.num_bytes for spec in mine if not spec.mesh_axes(here)),
        peak_bytes=max(
            receipt.peak_bytes
            for (s, _, t), receipt in distinct.items()
            if (s, t) == (stage, tensor if (stage, 0, tensor) in distinct else min(tensor, 1))
        ),
    )


def _boundary(number: int, stage: Stage) -> Boundary:
    gradients = sum(output.num_bytes for output in stage.outputs if output.requires_grad)
    return Boundary(number, len(stage.outputs), stage.output_bytes, gradients)


def _traffic(stage: int, receipt: Receipt) -> Iterator[Traffic]:
    kinds = dict.fromkeys((call.op, call.mesh_axes) for call in receipt.collectives)
    for op, mesh_axes in kinds:
        sizes = [call.num_bytes for call in receipt.collectives if (call.op, call.mesh_axes) == (op, mesh_axes)]
        yield Traffic(stage, op, mesh_axes, len(sizes), sum(sizes))


def _replicated(plan: Plan) -> tuple[tuple[str, str, int], ...]:
    if plan.mesh.tensor == 1:
        return ()
    first = plan.mesh.coordinate(0)
    whole = [spec for spec in plan.tree.values() if not spec.mesh_axes(first)]
    return tuple((s.path, s.type, s.num_bytes) for s in sorted(whole, key=lambda s: -s.num_bytes))
