"""The audit: what each rank will hold, send and risk, read off the steps that will run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve

from ..specs.distinct_ranks import Distinct
from ..specs.errors import PlanError
from ..specs.file_reads import FileRead
from ..specs.finding import silenced
from ..specs.plan import Plan
from ..specs.report import Report
from ..specs.traffic import Boundary
from .auditing.contents_trace import trace
from .auditing.findings.all_findings import find_all, unused_silences
from .auditing.memory import shares
from .auditing.proofs import prove
from .auditing.traffic import execution_traffic, step_traffic
from .dialects import dialect_of

if TYPE_CHECKING:
    from ..specs.mesh import Coordinate
    from ..specs.pipeline import Stage
    from ..specs.receipt import Receipt


def audit(plan: Plan, *, ranks_per_node: int | None = None, device_memory: int | None = None) -> Report:
    """Return a report of each rank's memory, messages and risks, without running the plan: no device, no process group.

    Time and memory go by tensors and by kinds of ranks, not by ranks.

    Args:
        plan: The plan.
        ranks_per_node: Ranks that share a node; with it traffic is told apart into inside and between nodes.
        device_memory: Bytes of a device; with it a rank that needs more is an error.

    Raises:
        PlanError: If a saved plan's configuration has other values where memory and messages are computed from numbers.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> from shardplan.specs.steps import Allocate, Place
    >>> tree = SpecTree([ParamSpec("weight", (4, 4), "float32")])
    >>> report = audit(Plan(Mesh(data=64), tree, [Allocate(0, ("weight",)), Place(0, ("weight",))]))
    >>> report.memory(rank=17).parameter_bytes, report.proof("cover").holds
    (64, True)
    """
    _check(plan, ranks_per_node, device_memory)
    dialect = dialect_of(plan.target)
    if problems := list(dialect.wrong_numbers(plan.config or {})):
        raise PlanError(problems)
    distinct = Distinct.of(plan.mesh, plan.tree)
    traces = trace(plan, distinct)
    receipts = {here: done.ledger.receipt(here.rank) for here, done in traces.items()}
    report = Report(
        title=f"audit of plan {plan.fingerprint[:12]}, {plan.mesh}, target={plan.target or 'none'}",
        mesh=plan.mesh,
        distinct=distinct,
        shares=tuple(shares(plan, dialect, distinct, {here: receipt.peak_bytes for here, receipt in receipts.items()})),
        execution=tuple(execution_traffic(receipts)),
        reads=tuple(_reads(receipts, dict(distinct.places()))),
        folder=plan.folder,
        training=tuple(step_traffic(plan, dialect, ranks_per_node)),
        boundaries=tuple(_boundary(number, stage) for number, stage in enumerate(plan.stages[:-1])),
        replicated=_replicated(plan),
        proofs=prove(plan, distinct, traces),
        trusts=plan.trusts,
        num_microbatches=dialect.training(plan).num_microbatches,
        ranks_per_node=ranks_per_node,
        device_memory=device_memory,
    )
    loud, quiet = silenced(find_all(plan, report, dialect), plan.silences, plan.tree)
    return evolve(report, findings=(*loud, *unused_silences(plan, report, quiet)), silenced=tuple(quiet))


def _check(plan: object, ranks_per_node: object, device_memory: object) -> None:
    if not isinstance(plan, Plan):
        msg = f"audit takes a plan, not a {type(plan).__name__}: audit(plan_build(schedule))"
        raise TypeError(msg)
    for name, value in (("ranks_per_node", ranks_per_node), ("device_memory", device_memory)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            example = "8" if name == "ranks_per_node" else "80 * 2**30"
            msg = f"{name} is a positive integer, not {value!r}: audit(plan, {name}={example})"
            raise ValueError(msg)


def _boundary(number: int, stage: Stage) -> Boundary:
    gradients = sum(output.num_bytes for output in stage.outputs if output.requires_grad)
    return Boundary(number, len(stage.outputs), stage.output_bytes, gradients)


def _reads(receipts: Mapping[Coordinate, Receipt], num_ranks: Mapping[Coordinate, int]) -> Iterator[FileRead]:
    for here, receipt in receipts.items():
        yield from (FileRead(here, num_ranks[here], file, num_bytes) for file, num_bytes in receipt.reads)


def _replicated(plan: Plan) -> tuple[tuple[str, str, int], ...]:
    if plan.mesh.tensor == 1:
        return ()
    first = plan.mesh.coordinate(0)
    whole = [spec for spec in plan.tree.values() if not spec.mesh_axes(first)]
    return tuple((s.path, s.type, s.num_bytes) for s in sorted(whole, key=lambda s: -s.num_bytes))
