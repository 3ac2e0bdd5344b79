"""The cost of a training step: seconds of computation and of messages, as ``search`` counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...specs.mesh import Mesh
from ...specs.traffic import StepTraffic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...specs.report import Report

FLOPS = 400e12
"""Operations per second of one device: Llama 3 405B was trained at 380 to 430 TFLOP/s on H100s in bfloat16 (Dubey et al.
2024, The Llama 3 Herd of Models, table 4)."""

INSIDE = 450e9
"""Bytes per second from a device to its node: NVLink of an H100, 900 GB/s both ways (NVIDIA H100 datasheet)."""

BETWEEN = 50e9
"""Bytes per second from a device to other nodes: one 400 Gbit/s link for each (NVIDIA DGX H100 datasheet)."""


def step_seconds(mesh: Mesh, num_microbatches: int, forward_flops: int, inside_bytes: int, between_bytes: int) -> float:
    """Return the estimated seconds of a training step: the formula of ``search``, with bytes as ``charged``.

    >>> step_seconds(Mesh(pipe=2), 1, forward_flops=400_000_000_000_000, inside_bytes=0, between_bytes=0)
    3.0
    """
    m, p = num_microbatches, mesh.pipe
    computing = 3 * forward_flops * m / (p * mesh.tensor * FLOPS)
    sending = inside_bytes / INSIDE + between_bytes / BETWEEN
    return (computing + sending) / (1 - (p - 1) / (m + p - 1))


def charged(rows: Iterable[StepTraffic]) -> tuple[int, int]:
    """Return the bytes that are charged at the speed inside a node, and between nodes.

    Each round of a ring sends one part over all its hops at once (Patarasu and Yuan 2009, section 4), and the next round
    waits for the slowest hop: a ring with any hop between nodes runs at that hop's speed. A message from rank to rank is
    charged by its own hop.

    >>> ring = StepTraffic(0, "data", "gradients", "all_reduce", 1, 400, wire_bytes=600, between_bytes=150)
    >>> message = StepTraffic(0, "pipe", "boundary", "send", 2, 600, wire_bytes=600, between_bytes=150)
    >>> charged([ring]), charged([message])
    ((0, 600), (450, 150))
    """
    inside = between = 0
    for row in rows:
        slow = row.wire_bytes if row.between_bytes and row.op != "send" else row.between_bytes
        inside, between = inside + row.wire_bytes - slow, between + slow
    return inside, between


def busiest(report: Report) -> list[StepTraffic]:
    """Return the messages of a rank on the stage whose messages take longest."""
    stages: dict[int, list[StepTraffic]] = {0: []}
    for row in report.training:
        stages.setdefault(row.stage, []).append(row)
    return max(stages.values(), key=lambda rows: charged(rows)[0] / INSIDE + charged(rows)[1] / BETWEEN)
