"""Messages of ranks: while the plan is executed, and in each step of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ...specs.layout_steps import RING_PASSES, SumGradient
from ...specs.mesh import Coordinate, MeshAxis
from ...specs.paths import join
from ...specs.traffic import Cargo, StepTraffic, Traffic
from ..dialects.accounting.messages import Messages
from .module_tree import stages_of

if TYPE_CHECKING:
    from ...specs.mesh import Groups, Mesh
    from ...specs.plan import Plan
    from ...specs.receipt import Receipt
    from ..dialects import Dialect


def execution_traffic(receipts: Mapping[Coordinate, Receipt]) -> Iterator[Traffic]:
    """Iterate over the messages of execution, for each distinct coordinate by kind and group."""
    for here, receipt in receipts.items():
        sizes: dict[tuple[str, tuple[MeshAxis, ...]], list[int]] = {}
        for call in receipt.collectives:
            sizes.setdefault((call.op, call.mesh_axes), []).append(call.num_bytes)
        for (op, mesh_axes), each in sizes.items():
            yield Traffic(here, op, mesh_axes, len(each), sum(each))


def step_traffic(plan: Plan, dialect: Dialect, ranks_per_node: int | None) -> Iterator[StepTraffic]:
    """Iterate over the messages of a training step, stage by stage.

    Messages of activations are known where a micro-batch was followed, messages between stages where the model is cut.
    """
    mesh, num_micro = plan.mesh, dialect.training(plan).num_microbatches
    rows: dict[tuple[int, MeshAxis, Cargo, str], tuple[int, int]] = {}

    def add(place: int, mesh_axis: MeshAxis, cargo: Cargo, op: str, num_calls: int, num_bytes: int) -> None:
        if mesh.num(mesh_axis) > 1 and num_calls:
            before = rows.get((place, mesh_axis, cargo, op), (0, 0))
            rows[place, mesh_axis, cargo, op] = before[0] + num_calls, before[1] + num_bytes

    calls = plan.microbatch.calls if plan.microbatch else ()
    stage_of = stages_of(plan, [call.module for call in calls])
    for call in calls:
        place = stage_of[call.module] % mesh.pipe
        add(place, call.mesh_axis, call.cargo, call.op, num_micro * call.num_calls, num_micro * call.num_bytes)
    sent: dict[int, dict[int, int]] = {}
    for place in range(mesh.pipe):
        here = mesh.at(pipe=place)
        messages = (*dialect.messages(plan, here), *expert_sums(plan, here, num_micro))
        for row in sorted(messages, key=lambda row: (row.mesh_axis, row.cargo) == ("pipe", "gradients")):  # tied sums last
            add(place, row.mesh_axis, row.cargo, row.op, row.num_calls, row.num_bytes)
            if row.to is not None:
                sent.setdefault(place, {})[row.to] = row.num_bytes
    for (place, mesh_axis, cargo, op), (num_calls, num_bytes) in sorted(rows.items(), key=lambda row: row[0][0]):
        wire, between = wire_bytes(op, mesh.num(mesh_axis), num_bytes), 0
        if ranks_per_node and op == "send":
            between = _messages_leaving(mesh, place, sent[place], ranks_per_node)
        elif ranks_per_node:
            between = round(wire * _leaving(mesh, place, mesh_axis, ranks_per_node))
        yield StepTraffic(place, mesh_axis, cargo, op, num_calls, num_bytes, wire, between)


def expert_sums(plan: Plan, coordinate: Coordinate, num_microbatches: int) -> Iterator[Messages]:
    """Iterate over the sums of experts' gradients over ``expert_data``, which the plan does in each backward pass.

    Where a micro-batch was followed they are among its calls.
    """
    followed = plan.microbatch.calls if plan.microbatch else ()
    if plan.mesh.expert_data == 1 or any(call.mesh_axis == "expert_data" for call in followed):
        return
    summed = [
        plan.tree[join(step.module, step.name)]
        for step in plan.steps
        if isinstance(step, SumGradient) and step.mesh_axis == "expert_data"
    ]
    sizes = [spec.local_bytes(coordinate) for spec in summed if coordinate.pipe in spec.places(plan.mesh)]
    if sizes:
        num_calls, num_bytes = num_microbatches * len(sizes), num_microbatches * sum(sizes)
        yield Messages("expert_data", "gradients", "all_reduce", num_calls, num_bytes)


def wire_bytes(op: str, num_ranks: int, num_bytes: int) -> int:
    """Return the bytes that a rank sends, by the ring algorithms (Patarasu and Yuan 2009, section 4).

    >>> wire_bytes("all_reduce", 4, 100), wire_bytes("all_gather", 4, 100), wire_bytes("send", 2, 100)
    (150, 75, 100)
    """
    return num_bytes * RING_PASSES[op] * (num_ranks - 1) // num_ranks if op in RING_PASSES else num_bytes


def _messages_leaving(mesh: Mesh, place: int, sent: Mapping[int, int], ranks_per_node: int) -> int:
    """Return the largest number of bytes that any rank sends to stages on other nodes."""
    first, stride = mesh.stage(place).start, mesh.groups("pipe").stride
    return max(
        sum(
            num_bytes
            for to, num_bytes in sent.items()
            if rank // ranks_per_node != (rank + (to - place) * stride) // ranks_per_node
        )
        for rank in range(first, first + min(stride, ranks_per_node))
    )


def _leaving(mesh: Mesh, place: int, mesh_axis: MeshAxis, ranks_per_node: int) -> float:
    """Return the share of a ring's hops, in the order of ranks, that leave their node; in the worst group."""
    groups = mesh.groups(mesh_axis)
    return max(_crossing(group, ranks_per_node) for group in _aligned_otherwise(mesh, place, groups, ranks_per_node))


def _aligned_otherwise(mesh: Mesh, place: int, groups: Groups, ranks_per_node: int) -> Iterator[range]:
    """Iterate over groups of a stage that lie differently across nodes; after them the pattern repeats."""
    stage, block = mesh.stage(place), groups.size * groups.stride
    first = groups.of(stage.start).start
    for start in range(first, stage.stop, block)[:ranks_per_node]:
        yield from (groups.of(start + offset) for offset in range(min(groups.stride, ranks_per_node)))


def _crossing(group: range, ranks_per_node: int) -> float:
    nodes = [rank // ranks_per_node for rank in group]
    return sum(here != there for here, there in zip(nodes, [*nodes[1:], nodes[0]], strict=True)) / len(nodes)
