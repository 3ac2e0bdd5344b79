"""Bookkeeping of one rank: allocations, messages, reads and placed tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import Factory, define

from ...specs.receipt import Collective, Receipt

if TYPE_CHECKING:
    from ...specs.mesh import MeshAxis


@define
class Ledger:
    """Adds up the reports of a rank's effects; gives the receipt."""

    live_bytes: int = 0
    peak_bytes: int = 0
    allocated_bytes: int = 0
    num_tensors: int = 0
    held_bytes: int = 0
    num_groups: int = 0
    collectives: list[Collective] = Factory(list)
    reads: dict[str, int] = Factory(dict)

    def allocate(self, num_bytes: int) -> None:
        """Note an allocation."""
        self.allocated_bytes += num_bytes
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def free(self, num_bytes: int) -> None:
        """Note that an allocation is freed."""
        self.live_bytes -= num_bytes
        assert self.live_bytes >= 0, "more was freed than allocated"

    def place(self, num_bytes: int) -> None:
        """Note a placed tensor, by the bytes of its storage."""
        self.num_tensors += 1
        self.held_bytes += num_bytes

    def call(self, op: str, mesh_axes: tuple[MeshAxis, ...], group: range, num_bytes: int) -> None:
        """Note a collective, by the bytes that each member gets."""
        self.collectives.append(Collective(op, mesh_axes, (group.start, group.stop, group.step), num_bytes))

    def read(self, file: str, num_bytes: int) -> None:
        """Note bytes read from a file."""
        self.reads[file] = self.reads.get(file, 0) + num_bytes

    def receipt(self, rank: int, seconds: float = 0.0) -> Receipt:
        """Return the receipt of everything noted so far."""
        return Receipt(
            rank=rank,
            num_tensors=self.num_tensors,
            held_bytes=self.held_bytes,
            allocated_bytes=self.allocated_bytes,
            peak_bytes=self.peak_bytes,
            num_groups=self.num_groups,
            collectives=tuple(self.collectives),
            reads=tuple(sorted(self.reads.items())),
            seconds=seconds,
        )
