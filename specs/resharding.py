"""Transfers between ranks to go from a plan's mesh to another's, by integer arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod

from attrs import frozen

from .dtypes import human_bytes, num_bytes
from .index import Index, index_shape
from .intervals import Interval, common, without
from .mesh import STAGE_AXES, Coordinate, Mesh, MeshAxis, unsplit
from .param import ParamSpec
from .plan import Plan
from .shard import Shard
from .text_table import ranges, table

_Tensor = tuple[tuple[int, ...], tuple[Shard, ...], tuple[int, ...], tuple[Shard, ...], tuple[int, ...]]
"""All that decides how a tensor moves: its shape, and of source and target its shards and places along ``pipe``."""

_WIDE = 40


@frozen
class Transfer:
    """A part of a tensor that goes from a rank to another, or stays where it is.

    Args:
        path: The tensor.
        index: The part, in entries of the whole tensor.
        source: Rank that has it, on the source's mesh.
        target: Rank that gets it, on the target's mesh.
    """

    path: str
    index: Index
    source: int
    target: int

    @property
    def num_elements(self) -> int:
        """Elements of the part."""
        return prod(index_shape(self.index))


@frozen(repr=False)
class Reshard:
    """The transfers that turn the shards of a plan into the shards of another. Data, like a plan.

    Every element comes from a single rank: the target rank itself where it has it as a rank of the source; else its holders
    take turns by the number of the target rank, so that replicas share the load.

    Args:
        source: The plan that was executed.
        target: The plan that goes on. It may have more ranks or fewer; rank n of both is the same process.
    """

    source: Plan
    target: Plan

    @property
    def num_ranks(self) -> int:
        """Processes that take part: as many as the larger mesh has ranks."""
        return max(self.source.mesh.num_ranks, self.target.mesh.num_ranks)

    def receives(self, rank: int) -> tuple[Transfer, ...]:
        """Return all parts of a target rank, also those it has already, in the order of the target's tensors."""
        if rank >= self.target.mesh.num_ranks:
            return ()
        return tuple(move for spec in self.target.tree.values() for move in self.of(spec.path, rank))

    def sends(self, rank: int) -> tuple[Transfer, ...]:
        """Return the parts that a source rank sends; the time is linear in the ranks of the target."""
        targets = range(self.target.mesh.num_ranks)
        moves = (move for spec in self.target.tree.values() for target in targets for move in self.of(spec.path, target))
        return tuple(move for move in moves if move.source == rank != move.target)

    def of(self, path: str, rank: int) -> Iterator[Transfer]:
        """Iterate over the parts of a tensor that a target rank gets."""
        for index, source in _moves(self._tensor(path), self.source.mesh, self.target.mesh, rank):
            yield Transfer(path, index, source, rank)

    def kinds(self) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
        """Iterate over tensors and ranks that are alike: paths and ranks for which all that moves is the same.

        But for which of several replicas sends. The first path and the first rank stand for all.
        """
        alike: dict[_Tensor, list[str]] = {}
        for spec in self.target.tree.values():
            alike.setdefault(self._tensor(spec.path), []).append(spec.path)
        for tensor, paths in alike.items():
            ranks: dict[object, list[int]] = {}
            for rank in range(self.target.mesh.num_ranks):
                if (place := _place(tensor, self.source.mesh, self.target.mesh, rank)) is not None:
                    ranks.setdefault(place, []).append(rank)
            yield from ((tuple(paths), tuple(some)) for some in ranks.values())

    def _tensor(self, path: str) -> _Tensor:
        before, after = self.source.tree[path], self.target.tree[path]
        places = before.places(self.source.mesh), after.places(self.target.mesh)
        return after.orig_shape, before.shards, places[0], after.shards, places[1]

    def __repr__(self) -> str:
        return f"Reshard({self.source!r}, {self.target!r})"

    def __str__(self) -> str:
        stays, sent = ([0] * self.target.mesh.num_ranks for _ in range(2))
        for paths, ranks in self.kinds():
            item_bytes = sum(num_bytes(self.target.tree[path].dtype) for path in paths)
            for move in self.of(paths[0], ranks[0]):
                counted = stays if move.source == move.target else sent
                for rank in ranks:
                    counted[rank] += move.num_elements * item_bytes
        rows: dict[tuple[str, str], list[int]] = {}
        for rank, sizes in enumerate(zip(stays, sent, strict=True)):
            rows.setdefault((human_bytes(sizes[0]), human_bytes(sizes[1])), []).append(rank)
        size = human_bytes(sum(spec.num_bytes for spec in self.target.tree.values()))
        head = f"reshard {len(self.target.tree)} tensors of {size}: {self.source.mesh} -> {self.target.mesh}"
        cells = [(_some(ranks), *sizes) for sizes, ranks in rows.items()]
        return "\n".join([head, "", *table([("ranks", "have already", "are sent"), *cells], right=True)])


@lru_cache(maxsize=2**16)
def _moves(tensor: _Tensor, before: Mesh, after: Mesh, rank: int) -> tuple[tuple[Index, int], ...]:
    """Return the parts of a tensor that a rank of the target gets, and from which rank of the source."""
    shape, shards, places, new_shards, new_places = tensor
    here = after.coordinate(rank)
    if here.pipe not in new_places:
        return ()
    wanted = ParamSpec("", shape, "float32", shards=new_shards).index(here)
    own = _own(places, before, rank)
    split = [shard for shard in shards if before.num(shard.mesh_axis) > 1]
    found: list[tuple[Index, int]] = []
    for chosen in product(*(_assigned(shard, shape[shard.axis], before, own) for shard in split)):
        index = list(wanted)
        for shard, (_, intervals) in zip(split, chosen, strict=True):
            index[shard.axis] = common(index[shard.axis], intervals)
        if 0 not in index_shape(tuple(index)):
            at: dict[MeshAxis, int] = {shard.mesh_axis: place for shard, (place, _) in zip(split, chosen, strict=True)}
            found.append((tuple(index), _holder(at, places, before, own, rank)))
    return tuple(found)


def _assigned(shard: Shard, size: int, mesh: Mesh, own: Coordinate | None) -> list[tuple[int, tuple[Interval, ...]]]:
    """Return from which place along a mesh axis each entry of an axis comes: this rank's own place first, then the first."""
    mine = None if own is None else own.index(shard.mesh_axis)
    kept: tuple[Interval, ...] = ()
    if mine is not None and own is not None:
        kept = shard.intervals(size, own)
    found: list[tuple[int, tuple[Interval, ...]]] = []
    for place in range(mesh.num(shard.mesh_axis)):
        if place == mine:
            found.append((place, kept))
            continue
        held = shard.held(size, mesh.at(**{shard.mesh_axis: place}))
        first = tuple((part.start, part.stop) for part in held if part.holder == 0)
        found.append((place, without(first, kept)))
    return [(place, intervals) for place, intervals in found if intervals]


def _holder(at: dict[MeshAxis, int], places: tuple[int, ...], mesh: Mesh, own: Coordinate | None, rank: int) -> int:
    """Return the rank that gives a part: the target rank if it has the part, else a holder, in turn."""
    if own is not None and all(own.index(mesh_axis) == place for mesh_axis, place in at.items()):
        return own.rank
    turn, pipe = divmod(rank, len(places))
    found = {"pipe": places[pipe], **at}
    for mesh_axis in unsplit(STAGE_AXES, at):
        turn, found[mesh_axis] = divmod(turn, mesh.num(mesh_axis))
    return mesh.at(**found).rank


def _place(tensor: _Tensor, before: Mesh, after: Mesh, rank: int) -> object:
    """Return a rank's places on both meshes along the axes that split a tensor; ranks at equal places get the same part."""
    _, shards, places, new_shards, new_places = tensor
    here, own = after.coordinate(rank), _own(places, before, rank)
    if here.pipe not in new_places:
        return None
    had = None if own is None else tuple(own.index(shard.mesh_axis) for shard in shards)
    return tuple(here.index(shard.mesh_axis) for shard in new_shards), had


def _own(places: tuple[int, ...], before: Mesh, rank: int) -> Coordinate | None:
    """Return where a rank of the target stands on the source's mesh, if it holds some of a tensor there."""
    own = before.coordinate(rank) if rank < before.num_ranks else None
    return own if own is not None and own.pipe in places else None


def _some(ranks: list[int]) -> str:
    text = ranges(ranks)
    return text if len(text) <= _WIDE else f"{len(ranks)} ranks from {ranks[0]} on"
