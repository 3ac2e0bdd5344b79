"""From a step for all ranks to the work that it asks of one rank."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, assert_never

from attrs import evolve

from ...specs import steps
from ...specs.mesh import STAGE_AXES, factors, unsplit
from . import work
from .work import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...specs.mesh import Coordinate, Mesh, MeshAxis
    from ...specs.param import ParamSpec
    from ...specs.tree import SpecTree


def resolve(step: steps.Step, coordinate: Coordinate, tree: SpecTree) -> work.Work:  # noqa: C901, PLR0911, PLR0912  one case a step
    """Return the work that a step asks of the rank at ``coordinate``: the one place where ranks and intervals are computed.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard, SpecTree
    >>> from shardplan.specs.steps import Scatter
    >>> tree = SpecTree([ParamSpec("up.weight", (8, 4), "float32", shards=(Shard(0),))])
    >>> message = resolve(Scatter(stage=0, paths=("up.weight",), over=("tensor",)), Mesh(tensor=4).coordinate(2), tree)
    >>> message.group, message.is_root, message.pieces[0].index
    (range(0, 4), False, (((4, 6),), ((0, 4),)))
    """
    if isinstance(step, steps.LayoutStep):
        return work.ChangeLayout(step)
    match step:
        case steps.Agree():
            return work.Agree()
        case steps.MakeGroups(over=over, sharing=sharing):
            mesh = coordinate.mesh
            made = [*(mesh.groups(*mesh_axes) for mesh_axes in over), *(mesh.neighbours(*pair) for pair in sharing)]
            return work.MakeGroups(over, sharing, sum(map(len, made)))
        case steps.MakeTieGroups(between=between):
            return work.MakeTieGroups(between, tuple(tuple(_tied_ranks(coordinate.mesh, places)) for places in between))
        case steps.CheckLoaded():
            return work.CheckLoaded()
        case steps.SendCopy(paths=()) | steps.Scatter(paths=()) | steps.Broadcast(paths=()):
            return work.Nothing()
        case steps.SendCopy(stage=stage, to=to, paths=paths):
            return _send_copy(_shards(tree, paths, coordinate), (stage, to), coordinate)
        case steps.TakeStages():
            return work.TakeStages(coordinate.pipe)
        case steps.SumTied(path=path, between=between):
            return work.SumTied(tree[path], between) if coordinate.pipe in between else work.Nothing()
        case steps.AsDTensors(mesh_axes=mesh_axes):
            return work.AsDTensors(mesh_axes, tuple(tree.values()))
        case steps.MakeOptimizer():
            return work.MakeOptimizer()
        case steps.Wrap():
            return work.Wrap()
        case _ if step.stage != coordinate.pipe:
            return work.Nothing()
        case steps.Generate() | steps.EvaluateWhole() | steps.TakeWhole() if not coordinate.is_first(*STAGE_AXES):
            return work.Nothing()
        case steps.Generate(paths=paths, calls=calls, scratch=scratch, key=key):
            return work.Generate(paths, _whole(tree, paths), _whole(tree, scratch), calls, key)
        case steps.EvaluateWhole(paths=paths):
            return work.Evaluate(_whole(tree, paths))
        case steps.EvaluateShard(paths=paths):
            return work.Evaluate(_shards(tree, paths, coordinate))
        case steps.TakeWhole(paths=paths):
            return work.Take(_whole(tree, paths))
        case steps.TakeShard(paths=paths):
            return work.Take(_shards(tree, paths, coordinate))
        case steps.LoadShard(paths=paths, over=over):
            return work.LoadShard(_shards(tree, paths, coordinate)) if coordinate.is_first(*over) else work.Nothing()
        case steps.LoadOwn(paths=paths):
            return work.LoadOwn(_shards(tree, paths, coordinate))
        case steps.Allocate(paths=paths):
            return work.Allocate(_shards(tree, paths, coordinate))
        case steps.Scatter(paths=paths, over=over):
            return _scatter(_shards(tree, paths, coordinate), over, coordinate)
        case steps.Broadcast(paths=paths, over=over):
            pieces = tuple(_broadcast_piece(tree[path], over, coordinate) for path in paths)
            return work.Message("broadcast", over, coordinate.group(*over), coordinate.is_first(*over), pieces)
        case steps.Slice(paths=paths):
            return work.Slice(_shards(tree, paths, coordinate))
        case steps.Place(paths=paths):
            return work.Place(tuple(tree[path] for path in paths))
        case steps.Tie(path=path, aliases=aliases):
            return work.Tie(tree[path], aliases)
        case _:
            assert_never(step)


def _whole(tree: SpecTree, paths: tuple[str, ...]) -> tuple[Piece, ...]:
    return tuple(Piece.whole(tree[path]) for path in paths)


def _shards(tree: SpecTree, paths: tuple[str, ...], coordinate: Coordinate) -> tuple[Piece, ...]:
    return tuple(Piece.part(tree[path], coordinate) for path in paths)


def _tied_ranks(mesh: Mesh, places: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Iterate over the groups of ranks at these places along ``pipe`` that agree in all other mesh axes."""
    return (tuple(_rank_at(mesh.coordinate(rank), place) for place in places) for rank in mesh.stage(0))


def _rank_at(coordinate: Coordinate, place: int) -> int:
    """Return the rank at another place along ``pipe``."""
    return evolve(coordinate, pipe=place).rank


def _send_copy(pieces: tuple[Piece, ...], between: tuple[int, int], coordinate: Coordinate) -> work.Work:
    if coordinate.pipe not in between:
        return work.Nothing()
    first, second = (_rank_at(coordinate, place) for place in between)
    group, is_root = range(first, 2 * second - first, second - first), coordinate.pipe == between[0]
    return work.Message("broadcast", ("pipe",), group, is_root, pieces, between=between)


def _scatter(pieces: tuple[Piece, ...], over: tuple[MeshAxis, ...], coordinate: Coordinate) -> work.Work:
    if not coordinate.is_first(*unsplit(STAGE_AXES, over)):
        return work.Nothing()
    group, is_root = coordinate.group(*over), coordinate.is_first(*over)
    parts: tuple[tuple[Piece, ...], ...] = ()
    if is_root:
        members = map(coordinate.mesh.coordinate, group)
        parts = tuple(tuple(Piece.part(p.spec, member) for p in pieces) for member in members)
    return work.Message("scatter", over, group, is_root, pieces, parts, pad_to=_longest_part(pieces, coordinate.mesh))


def _longest_part(pieces: tuple[Piece, ...], mesh: Mesh) -> int:
    """Return the number of elements of the first member's part, the longest, if parts may differ in length; else 0."""
    uneven = any(not shard.is_even(p.spec.orig_shape[shard.axis], mesh) for p in pieces for shard in p.spec.shards)
    return sum(prod(p.spec.local_shape(mesh.coordinate(0))) for p in pieces) if uneven else 0


def _broadcast_piece(spec: ParamSpec, over: tuple[MeshAxis, ...], coordinate: Coordinate) -> Piece:
    """Return the piece that is broadcast: the whole tensor if ``over`` holds a mesh axis that splits it, else the shard."""
    if set(factors(*spec.mesh_axes(coordinate))) & set(factors(*over)):
        return Piece.whole(spec)
    return Piece.part(spec, coordinate)
