"""Allocations, messages and time of a rank's execution."""

from __future__ import annotations

from attrs import field, frozen

from .dtypes import human_bytes
from .mesh import MeshAxis

AGREEMENT_BYTES = 8 * 16
"""Bytes that each rank contributes to an agreement: 16 integers of 8 bytes."""


@frozen
class Collective:
    """A collective that a rank took part in.

    Args:
        op: ``all_gather``, ``all_reduce``, ``broadcast`` or ``scatter``.
        mesh_axes: Mesh axes that the group spans; empty for all ranks.
        group: First rank, rank after the last, and stride of the group.
        num_bytes: Bytes of the message that each member gets.
    """

    op: str
    mesh_axes: tuple[MeshAxis, ...]
    group: tuple[int, int, int]
    num_bytes: int


@frozen
class Receipt:
    """The account of a rank's execution: predicted by the audit, kept by the interpreter.

    Args:
        rank: The rank.
        num_tensors: Tensors placed in its module, aliases not counted.
        held_bytes: Bytes of their storages.
        allocated_bytes: Bytes of all allocations, staging among them.
        peak_bytes: Most bytes that were allocated at one time, less what init code itself allocates, and less what
            evaluating init programs takes while it runs: chunks of 128 KiB a thread, constants of 64 MiB at most.
        num_groups: Process groups that it took part in making.
        collectives: Each collective, in order.
        reads: Bytes of tensors that it read, by file of the plan's folder; headers come on top.
        seconds: Time from start to end; outside equality.
    """

    rank: int
    num_tensors: int
    held_bytes: int
    allocated_bytes: int
    peak_bytes: int
    num_groups: int
    collectives: tuple[Collective, ...] = field(repr=False)
    reads: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    seconds: float = field(default=0.0, eq=False)

    @property
    def received_bytes(self) -> int:
        """Bytes of all messages that it took part in."""
        return sum(call.num_bytes for call in self.collectives)

    @property
    def read_bytes(self) -> int:
        """Bytes that it read from files."""
        return sum(num_bytes for _, num_bytes in self.reads)

    def __str__(self) -> str:
        read = f" {human_bytes(self.read_bytes)} read of {len(self.reads)} files," if self.reads else ""
        return (
            f"rank {self.rank}: {self.num_tensors} tensors, {human_bytes(self.held_bytes)} held,{read}"
            f" peak {human_bytes(self.peak_bytes)}, {len(self.collectives)} collectives of"
            f" {human_bytes(self.received_bytes)}, {self.num_groups} groups, {self.seconds:.2f} s"
        )
