"""Ownership of a tensor's elements: each element has one owner, which alone saves it, sends it or counts it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from .index import Index, index_shape, whole_index
from .intervals import common, placed
from .mesh import STAGE_AXES, unsplit

if TYPE_CHECKING:
    from .mesh import Coordinate, Mesh
    from .param import ParamSpec
    from .stored import Box


def holders(spec: ParamSpec, mesh: Mesh) -> tuple[tuple[int, Index], ...]:
    """Return ranks, in order, and a part of a tensor for each: together they are the tensor, each element once.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard
    >>> kv = ParamSpec("k_proj.weight", (4, 8), "float32", shards=(Shard(0, granule=2, replicate=True),))
    >>> holders(kv, Mesh(data=2, tensor=4))
    ((0, (((0, 2),), ((0, 8),))), (2, (((2, 4),), ((0, 8),))))
    """
    found = ((here.rank, held_first(spec, here)) for here in _places(spec, mesh))
    return tuple((rank, index) for rank, index in found if index is not None)


def held_first(spec: ParamSpec, coordinate: Coordinate) -> Index | None:
    """Return the part of a tensor that a coordinate holds and no earlier coordinate does; None for nothing.

    Earlier are: the place along ``pipe`` of the tensor's stage before the places of its copies, place 0 along an axis that
    does not split the tensor before further places, and the first of the neighbours that hold the same granules.
    """
    whole_along = unsplit(STAGE_AXES, spec.mesh_axes(coordinate))
    if coordinate.pipe != spec.places(coordinate.mesh)[0] or not coordinate.is_first(*whole_along):
        return None
    index = list(whole_index(spec.orig_shape))
    for shard in spec.shards:
        held = shard.held(spec.orig_shape[shard.axis], coordinate)
        index[shard.axis] = tuple((part.start, part.stop) for part in held if part.holder == 0)
    return tuple(index) if 0 not in index_shape(tuple(index)) else None


def _places(spec: ParamSpec, mesh: Mesh) -> Iterator[Coordinate]:
    """Iterate over the coordinates that may be first: along each mesh axis all places where it splits, else place 0."""
    split = spec.mesh_axes(mesh.coordinate(0))
    for places in product(*(range(mesh.num(mesh_axis)) for mesh_axis in split)):
        yield mesh.at(pipe=spec.places(mesh)[0], **dict(zip(split, places, strict=True)))


def local_boxes(spec: ParamSpec, coordinate: Coordinate, index: Index) -> Iterator[tuple[Box, Box]]:
    """Iterate over the boxes of a part that a coordinate holds: the box in the whole tensor, and in the local shard.

    Args:
        spec: The tensor.
        coordinate: Who holds it.
        index: The part, within the coordinate's shard.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard
    >>> qkv = ParamSpec("qkv", (8, 3), "float32", shards=(Shard(0, blocks=(4, 4)),))
    >>> last = Mesh(tensor=2).coordinate(1)
    >>> list(local_boxes(qkv, last, qkv.index(last)))
    [(((2, 4), (0, 3)), ((0, 2), (0, 3))), (((6, 8), (0, 3)), ((2, 4), (0, 3)))]
    """
    axes = [list(placed(own, some)) for own, some in zip(spec.index(coordinate), index, strict=True)]
    for pairs in product(*axes):
        yield tuple(there for there, _ in pairs), tuple(here for _, here in pairs)


def clip(index: Index, box: Box) -> Index:
    """Return the intersection of a part and a box.

    >>> clip((((0, 4), (8, 12)),), ((2, 10),))
    (((2, 4), (8, 10)),)
    """
    return tuple(common(intervals, (edges,)) for intervals, edges in zip(index, box, strict=True))
