"""Which ranks are alike: so that what is computed for a few is known for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from attrs import frozen

from .mesh import Coordinate, Mesh, MeshAxis
from .shard import Interval

if TYPE_CHECKING:
    from .shard import Shard
    from .tree import SpecTree

_SHARED: tuple[MeshAxis, ...] = ("expert_data", "expert", "tensor")
"""The mesh axes of one stage, outermost first."""


@frozen
class Distinct:
    """The places along each mesh axis, in runs of places that are alike.

    Ranks are alike when they hold parts of the same sizes and both send, or both do not: the first place along an axis is
    alone, as it sends; the others are alike where all parts have one size. Stages are each their own.

    Args:
        mesh: The ranks.
        expert_data: Runs of places along ``expert_data``: the first place, and the one after the last.
        expert: The same along ``expert``.
        tensor: The same along ``tensor``.

    >>> distinct = Distinct(Mesh(data=64, tensor=8), ((0, 1), (1, 64)), ((0, 1),), ((0, 1), (1, 8)))
    >>> [(place.rank, num) for place, num in distinct.places()]
    [(0, 1), (1, 7), (8, 63), (9, 441)]
    >>> distinct.like(distinct.mesh.coordinate(500)).rank
    9
    """

    mesh: Mesh
    expert_data: tuple[Interval, ...]
    expert: tuple[Interval, ...]
    tensor: tuple[Interval, ...]

    @classmethod
    def of(cls, mesh: Mesh, tree: SpecTree) -> Distinct:
        """Return which ranks are alike for some tensors; it takes as long as an axis is, never as there are ranks."""
        split = {(spec.orig_shape[shard.axis], shard) for spec in tree.values() for shard in spec.shards}
        uneven = {(size, shard) for size, shard in split if not shard.is_even(size, mesh)}
        runs: dict[MeshAxis, tuple[Interval, ...]] = {}
        for mesh_axis in _SHARED:
            within = "data" if mesh_axis.startswith("expert") else mesh_axis
            if any(shard.mesh_axis == within == "data" for _, shard in uneven):
                runs[mesh_axis] = tuple((place, place + 1) for place in range(mesh.num(mesh_axis)))
            else:
                runs[mesh_axis] = tuple(_runs(mesh, mesh_axis, [pair for pair in uneven if pair[1].mesh_axis == mesh_axis]))
        return cls(mesh, runs["expert_data"], runs["expert"], runs["tensor"])

    def places(self) -> Iterator[tuple[Coordinate, int]]:
        """Iterate over the first coordinate of each kind, and how many ranks are like it, in the order of ranks."""
        mesh = self.mesh
        for pipe in range(mesh.pipe):
            for runs in product(self.expert_data, self.expert, self.tensor):
                (outer, _), (expert, _), (tensor, _) = runs
                num = 1
                for start, stop in runs:
                    num *= stop - start
                yield Coordinate(pipe=pipe, data=outer * mesh.expert + expert, tensor=tensor, mesh=mesh), num

    def like(self, coordinate: Coordinate) -> Coordinate:
        """Return the first coordinate that is like another."""
        outer, expert, tensor = (_start(self._runs(m), coordinate.index(m)) for m in _SHARED)
        mesh = self.mesh
        return Coordinate(pipe=coordinate.pipe, data=outer * mesh.expert + expert, tensor=tensor, mesh=mesh)

    def alike(self, coordinate: Coordinate) -> range:
        """Return the places along ``data`` of ranks that are like one, where there are no experts; else its own.

        >>> distinct = Distinct(mesh := Mesh(data=64, tensor=8), ((0, 1), (1, 64)), ((0, 1),), ((0, 1), (1, 8)))
        >>> distinct.alike(mesh.coordinate(8))
        range(1, 64)
        """
        if self.mesh.expert > 1:
            return range(coordinate.data, coordinate.data + 1)
        return next(range(*run) for run in self.expert_data if run[0] <= coordinate.data < run[1])

    def along(self, coordinate: Coordinate, mesh_axes: Iterable[MeshAxis]) -> Iterator[Coordinate]:
        """Iterate over coordinates of each kind that differ from one along some mesh axes only.

        >>> from shardplan.specs import SpecTree
        >>> distinct = Distinct.of(mesh := Mesh(pipe=2, data=4, tensor=8), SpecTree())
        >>> [place.rank for place in distinct.along(mesh.coordinate(0), ["pipe", "tensor"])]
        [0, 1, 32, 33]
        """
        free = {fine for m in mesh_axes for fine in (("expert_data", "expert") if m == "data" else (m,))}
        mesh = self.mesh
        pipes = range(mesh.pipe) if "pipe" in free else [coordinate.pipe]
        outers, experts, tensors = (
            [start for start, _ in self._runs(m)] if m in free else [coordinate.index(m)] for m in _SHARED
        )
        for pipe, outer, expert, tensor in product(pipes, outers, experts, tensors):
            yield Coordinate(pipe=pipe, data=outer * mesh.expert + expert, tensor=tensor, mesh=mesh)

    def _runs(self, mesh_axis: MeshAxis) -> tuple[Interval, ...]:
        return getattr(self, mesh_axis)


def _runs(mesh: Mesh, mesh_axis: MeshAxis, uneven: Sequence[tuple[int, Shard]]) -> Iterator[Interval]:
    """Iterate over runs of places that are alike: the first one alone, then those whose parts have the same sizes."""
    num = mesh.num(mesh_axis)
    if not uneven:
        yield from [(0, 1), (1, num)] if num > 1 else [(0, 1)]
        return
    start, before = 0, None
    for place in range(num):
        here = _at(mesh, mesh_axis, place)
        sizes = tuple(shard.length(size, here) for size, shard in uneven)
        if place == 1 or (place > 1 and sizes != before):
            yield start, place
            start = place
        before = sizes
    yield start, num


def _at(mesh: Mesh, mesh_axis: MeshAxis, place: int) -> Coordinate:
    """Return a coordinate at a place along one mesh axis, the first along all others."""
    data = {"expert_data": place * mesh.expert, "expert": place}.get(mesh_axis, 0)
    return Coordinate(pipe=0, data=data, tensor=place if mesh_axis == "tensor" else 0, mesh=mesh)


def _start(runs: tuple[Interval, ...], place: int) -> int:
    return next(start for start, stop in runs if start <= place < stop)
