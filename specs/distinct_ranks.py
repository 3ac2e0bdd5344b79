"""Groups of ranks that hold equally large parts, so that an audit computes each group once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from attrs import frozen

from .intervals import Interval
from .mesh import STAGE_AXES, Mesh, MeshAxis, factors, field_for_each, whole_of

if TYPE_CHECKING:
    from .mesh import Coordinate
    from .shard import Shard
    from .tree import SpecTree

_Runs = tuple[Interval, ...]
_FACTORS = factors(*STAGE_AXES)


@frozen(field_transformer=field_for_each(*_FACTORS, of=_Runs, first=False))
class Distinct:
    """The places along each mesh axis of a stage, ``data`` in its factors, in runs of places that are alike.

    Ranks are alike when they hold parts of the same sizes and both send, or both do not: the first place along an axis is
    alone, as it sends; further places are alike where all parts have the same size. No two stages are alike. A run is an
    interval of places.

    Args:
        mesh: The ranks.

    >>> distinct = Distinct(Mesh(data=64, tensor=8), ((0, 1), (1, 64)), ((0, 1),), ((0, 1), (1, 8)))
    >>> [(place.rank, num) for place, num in distinct.places()]
    [(0, 1), (1, 7), (8, 63), (9, 441)]
    >>> distinct.like(distinct.mesh.coordinate(500)).rank
    9
    """

    mesh: Mesh

    if TYPE_CHECKING:  # the runs are fields too

        def __init__(self, mesh: Mesh, *places: _Runs, **named: _Runs) -> None: ...

    @classmethod
    def of(cls, mesh: Mesh, tree: SpecTree) -> Distinct:
        """Return which ranks are alike for some tensors; it takes as long as an axis is, never as there are ranks."""
        split = {(spec.orig_shape[shard.axis], shard) for spec in tree.values() for shard in spec.shards}
        uneven = {(size, shard) for size, shard in split if not shard.is_even(size, mesh)}
        runs: dict[MeshAxis, _Runs] = {}
        for mesh_axis in _FACTORS:
            whole = whole_of(mesh_axis)
            if whole != mesh_axis and any(shard.mesh_axis == whole for _, shard in uneven):
                runs[mesh_axis] = tuple((place, place + 1) for place in range(mesh.num(mesh_axis)))
            else:
                runs[mesh_axis] = tuple(_runs(mesh, mesh_axis, [pair for pair in uneven if pair[1].mesh_axis == mesh_axis]))
        return cls(mesh, **runs)

    def runs(self, mesh_axis: MeshAxis) -> _Runs:
        """Return the runs of places along a mesh axis of a stage that has no factors."""
        return getattr(self, mesh_axis)

    def places(self) -> Iterator[tuple[Coordinate, int]]:
        """Iterate over the first coordinate of each kind, and how many ranks are like it, in the order of ranks."""
        for pipe in range(self.mesh.pipe):
            for runs in product(*map(self.runs, _FACTORS)):
                yield self._at(pipe, (start for start, _ in runs)), prod(stop - start for start, stop in runs)

    def like(self, coordinate: Coordinate) -> Coordinate:
        """Return the first coordinate that is like another."""
        return self._at(coordinate.pipe, (_start(self.runs(m), coordinate.index(m)) for m in _FACTORS))

    def alike(self, coordinate: Coordinate) -> range:
        """Return the places along ``data`` of the ranks that are like a coordinate; with experts, its own place alone.

        >>> distinct = Distinct(mesh := Mesh(data=64, tensor=8), ((0, 1), (1, 64)), ((0, 1),), ((0, 1), (1, 8)))
        >>> distinct.alike(mesh.coordinate(8))
        range(1, 64)
        """
        if self.mesh.expert > 1:
            return range(coordinate.data, coordinate.data + 1)
        return next(range(*run) for run in self.runs("expert_data") if run[0] <= coordinate.data < run[1])

    def along(self, coordinate: Coordinate, mesh_axes: Iterable[MeshAxis]) -> Iterator[Coordinate]:
        """Iterate over the distinct coordinates that differ from a coordinate only along some mesh axes.

        >>> from shardplan.specs import SpecTree
        >>> distinct = Distinct.of(mesh := Mesh(pipe=2, data=4, tensor=8), SpecTree())
        >>> [place.rank for place in distinct.along(mesh.coordinate(0), ["pipe", "tensor"])]
        [0, 1, 32, 33]
        """
        free = factors(*mesh_axes)
        pipes = range(self.mesh.pipe) if "pipe" in free else [coordinate.pipe]
        starts = ([start for start, _ in self.runs(m)] if m in free else [coordinate.index(m)] for m in _FACTORS)
        for pipe, *places in product(pipes, *starts):
            yield self._at(pipe, places)

    def _at(self, pipe: int, places: Iterable[int]) -> Coordinate:
        return self.mesh.at(pipe=pipe, **dict(zip(_FACTORS, places, strict=True)))


def _runs(mesh: Mesh, mesh_axis: MeshAxis, uneven: Sequence[tuple[int, Shard]]) -> Iterator[Interval]:
    """Iterate over runs of places that are alike: the first place alone, then places whose parts have the same sizes."""
    num = mesh.num(mesh_axis)
    if not uneven:
        yield from [(0, 1), (1, num)] if num > 1 else [(0, 1)]
        return
    start, before = 0, None
    for place in range(num):
        here = mesh.at(**{mesh_axis: place})
        sizes = tuple(shard.length(size, here) for size, shard in uneven)
        if place == 1 or (place > 1 and sizes != before):
            yield start, place
            start = place
        before = sizes
    yield start, num


def _start(runs: tuple[Interval, ...], place: int) -> int:
    return next(start for start, stop in runs if start <= place < stop)
