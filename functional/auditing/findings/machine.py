"""Demands on the machine: slow links between nodes, and the memory of a device: SP027, SP030."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from ..nearest_meshes import divisors, nearest_meshes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.memory import Memory
    from ....specs.mesh import Mesh
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ...dialects import Dialect

_PARTS = {
    "parameter_bytes": "parameters",
    "buffer_bytes": "buffers",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "states of the optimizer",
    "master_bytes": "float32 copies",
    "bucket_bytes": "buckets",
    "boundary_bytes": "boundaries",
    "activation_bytes": "activations, an estimate of",
}
_NUM_PARTS = 3


def tensor_across_nodes(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find groups along ``tensor`` that span several nodes, if the number of ranks per node is known."""
    mesh, here = plan.mesh, report.ranks_per_node
    if here is None or mesh.tensor == 1 or here % mesh.tensor == 0:
        return
    groups = mesh.groups("tensor")
    crossing = [group for group in groups if group[0] // here != group[-1] // here]
    if not crossing:
        return
    sent = sum(row.between_bytes for row in report.training if row.mesh_axis == "tensor")
    told = f", {human_bytes(sent)} a step between nodes" if sent else ""
    cause = (
        f"{len(crossing)} of {len(groups)} groups along 'tensor' reach across nodes of {here} ranks, the first is ranks"
        f" {crossing[0][0]} to {crossing[0][-1]}{told}: each layer waits for the slow links, forwards and backwards"
    )
    yield Finding("SP027", "warning", "", cause, _within(mesh, here))


def memory_overflow(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find ranks that need more memory than a device has, if the device's memory is known."""
    if report.device_memory is None or report.worst.memory.peak_bytes <= report.device_memory:
        return
    worst, limit = report.worst, report.device_memory
    over = sum(s.num_ranks for s in report.shares if s.memory.peak_bytes > limit)
    cause = (
        f"rank {worst.coordinate.rank} at {worst.coordinate} needs {human_bytes(worst.memory.peak_bytes)},"
        f" {human_bytes(worst.memory.peak_bytes - limit)} more than a device has ({human_bytes(limit)}), and"
        f" {over} of {plan.mesh.num_ranks} ranks need too much: {_largest(worst.memory)}"
    )
    # the peak of an execution on another mesh is not known without planning for it
    fits = nearest_meshes(plan, limit, report.ranks_per_node) if worst.memory.executing_bytes <= limit else ()
    ways = [f"It fits on {', '.join(_named(mesh, plan.mesh) for mesh in fits)}"] if fits else []
    if max(share.memory.checkpointed_peak_bytes for share in report.shares) <= limit:
        ways.append("with each block checkpointed it fits here too" if fits else "It fits with each block checkpointed")
    text = "; ".join(ways) or "No mesh of up to 8 times as many ranks fits: split more tensors, or take more stages, or ZeRO"
    yield Finding("SP030", "error", "", cause, text)


FINDINGS = {"SP027": tensor_across_nodes, "SP030": memory_overflow}


def _within(mesh: Mesh, here: int) -> str:
    """Return the nearest meshes of as many ranks whose groups along ``tensor`` stay within a node."""
    ranks = mesh.data * mesh.tensor
    fits = [n for n in divisors(gcd(ranks, here)) if (ranks // n) % mesh.expert == 0]
    sizes = sorted(fits, key=lambda n: (abs(n - mesh.tensor), -n))
    if not sizes or sizes[0] == 1:
        return f"No size above 1 divides the {here} ranks of a node and the {ranks} of a stage: tensor=1, or other nodes"
    meshes = [
        f"Mesh(pipe={mesh.pipe}, data={ranks // n}, tensor={n}{f', expert={mesh.expert}' if mesh.expert > 1 else ''})"
        for n in sizes[:2]
        if n > 1
    ]
    return f"{' or '.join(meshes)} stays within nodes"


def _largest(memory: Memory) -> str:
    """Return the largest parts of a rank's memory."""
    if memory.executing_bytes == memory.peak_bytes:
        return f"while the plan is executed, where {human_bytes(memory.held_bytes)} stay"
    parts = sorted(((getattr(memory, field) or 0, name) for field, name in _PARTS.items()), reverse=True)[:_NUM_PARTS]
    return ", ".join(f"{name} {human_bytes(size)}" for size, name in parts if size)


def _named(mesh: Mesh, planned: Mesh) -> str:
    expert = f", expert={mesh.expert}" if mesh.expert > 1 else ""
    ranks = f" with {mesh.num_ranks} ranks" if mesh.num_ranks != planned.num_ranks else ""
    return f"Mesh(pipe={mesh.pipe}, data={mesh.data}, tensor={mesh.tensor}{expert}){ranks}"
