"""Meshes that were tried: which fit, and the cost of a step on each."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from .dtypes import human_bytes
from .mesh import Mesh
from .text_table import table


@frozen
class Candidate:
    """A mesh that was tried.

    Args:
        mesh: The ranks.
        fits: Whether it can be planned, its audit finds no error, and the fullest rank fits its device.
        peak_bytes: Most bytes at one time of the fullest rank; the least that it can be where nothing was planned; None if
            the mesh was refused.
        inside_bytes: Bytes that a rank of the stage that is busiest sends inside its node in a training step; None if
            nothing was planned, as the next two.
        between_bytes: Bytes that it sends to other nodes.
        cost: Seconds for each micro-batch, the whole mesh at work; how they are counted is said by ``Search.assumed``.
        cause: Why it does not fit; ``""`` if it does.
    """

    mesh: Mesh
    fits: bool
    peak_bytes: int | None = None
    inside_bytes: int | None = None
    between_bytes: int | None = None
    cost: float | None = None
    cause: str = ""


@frozen
class Search:
    """All meshes of a number of ranks: first meshes that fit, by cost, then too large, then refused meshes.

    Args:
        num_ranks: Ranks of each mesh.
        device_memory: Bytes of a device.
        candidates: The meshes in this order.
        assumed: Assumptions of the cost, a sentence a line.
    """

    num_ranks: int
    device_memory: int
    candidates: tuple[Candidate, ...]
    assumed: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The first mesh that fits; None if none does."""
        return next((candidate for candidate in self.candidates if candidate.fits), None)

    def __str__(self) -> str:
        num = sum(candidate.fits for candidate in self.candidates)
        head = f"{len(self.candidates)} meshes of {self.num_ranks} ranks, {num} fit into {human_bytes(self.device_memory)}"
        lines = [head, *(["", *table(self._fitting(), right=True)] if num else [])]
        others = [candidate for candidate in self.candidates if not candidate.fits]
        for title, some in (
            ("too large", [c for c in others if c.peak_bytes is not None]),
            ("refused", [c for c in others if c.peak_bytes is None]),
        ):
            rows = [(str(c.mesh).removeprefix("mesh "), *self._why_not(c)) for c in some]
            lines += ["", title, *table(rows)] if rows else []
        return "\n".join([*lines, "", *self.assumed])

    def _fitting(self) -> Iterator[tuple[str, ...]]:
        yield "mesh", "peak", "of the device", "inside a node", "between nodes", "cost"
        for candidate in self.candidates:
            if candidate.fits and candidate.peak_bytes is not None:
                sent = (human_bytes(size or 0) for size in (candidate.inside_bytes, candidate.between_bytes))
                part = f"{100 * candidate.peak_bytes / self.device_memory:.0f} %"
                name = str(candidate.mesh).removeprefix("mesh ")
                yield name, human_bytes(candidate.peak_bytes), part, *sent, _seconds(candidate.cost or 0.0)

    def _why_not(self, candidate: Candidate) -> tuple[str, ...]:
        if candidate.peak_bytes is None:
            return (candidate.cause,)
        over = human_bytes(max(0, candidate.peak_bytes - self.device_memory))
        return f"{human_bytes(candidate.peak_bytes)}, {over} over", candidate.cause


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:#.3g} ms"
