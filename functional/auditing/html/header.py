"""The head of the page: which plan it is, and whether it may be executed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....specs.dtypes import human_bytes
from ....specs.mesh import MESH_AXES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan
    from ....specs.report import Report


def head(plan: Plan, report: Report) -> dict[str, Any]:
    """Return what stands above all: the plan, the verdict, the facts."""
    return {
        "heading": report.title.partition(",")[0],
        "fingerprint": plan.fingerprint,
        "ok": report.ok,
        "verdict": "execute takes this plan" if report.ok else report.verdict.removeprefix("no: "),
        "num_errors": sum(finding.severity == "error" for finding in report.findings),
        "num_warnings": sum(finding.severity == "warning" for finding in report.findings),
        "num_silenced": len(report.silenced),
        "num_stages": plan.mesh.pipe,
        "facts": [list(fact) for fact in _facts(plan, report)],
    }


def _facts(plan: Plan, report: Report) -> Iterator[tuple[str, str]]:
    mesh, worst = plan.mesh, report.worst
    axes = " × ".join(f"{mesh_axis} {mesh.num(mesh_axis)}" for mesh_axis in MESH_AXES)
    yield "mesh", f"{axes}, expert {mesh.expert}" if mesh.expert > 1 else axes
    yield "ranks", f"{mesh.num_ranks:,}"
    yield "target", plan.target or "none"
    yield "tensors", f"{len(plan.tree):,}"
    yield "most memory", f"{human_bytes(worst.memory.peak_bytes)} on rank {worst.coordinate.rank}"
    if report.device_memory is not None:
        yield "a device has", human_bytes(report.device_memory)
    if report.ranks_per_node is not None:
        yield "ranks a node", f"{report.ranks_per_node:,}"
    if report.host_peak_bytes:
        yield "host memory a node", human_bytes(report.host_peak_bytes)
    yield "micro-batches a step", f"{report.num_microbatches:,}"
    yield "seed", str(plan.seed)
