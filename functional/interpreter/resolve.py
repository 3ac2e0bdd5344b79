"""From a step for all ranks to what it asks of one rank."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal, assert_never

from attrs import evolve, frozen

from ...specs.dtypes import num_bytes
from ...specs.index import Index, index_shape, whole_index
from ...specs.mesh import STAGE_AXES, factors, unsplit
from ...specs.param import ParamSpec
from ...specs.steps import (
    AddBiasAfterSync,
    Agree,
    Allocate,
    AsDTensors,
    Broadcast,
    CheckLoaded,
    DispatchTokens,
    EvaluateShard,
    EvaluateWhole,
    ForkRng,
    Generate,
    LayoutStep,
    LoadOwn,
    LoadShard,
    MakeGroups,
    MakeOptimizer,
    MakeTieGroups,
    MaskPadding,
    Place,
    Scatter,
    SendCopy,
    SetAttributes,
    SetToLocalSize,
    Slice,
    Step,
    SumGradient,
    SumTied,
    Sync,
    TakeShard,
    TakeStages,
    TakeWhole,
    Tie,
    VocabParallel,
    Wrap,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...specs.mesh import Coordinate, Mesh, MeshAxis
    from ...specs.source import Call
    from ...specs.tree import SpecTree


@frozen
class Piece:
    """A part of one tensor, as it is allocated, cut or sent.

    Args:
        spec: The tensor.
        index: The part.
        shape: Its shape; where it is longer than the part along the first axis, zeros follow.
    """

    spec: ParamSpec
    index: Index
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, spec: ParamSpec) -> Piece:
        """Return all of a tensor."""
        return cls(spec, whole_index(spec.orig_shape), spec.orig_shape)

    @classmethod
    def part(cls, spec: ParamSpec, coordinate: Coordinate) -> Piece:
        """Return what a coordinate holds of a tensor."""
        return cls(spec, spec.index(coordinate), spec.local_shape(coordinate))

    @property
    def path(self) -> str:
        """Canonical path of the tensor."""
        return self.spec.path

    @property
    def num_elements(self) -> int:
        """Elements of the part."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return self.num_elements * num_bytes(self.spec.dtype)

    @property
    def is_run(self) -> bool:
        """Whether it lies in one piece in the whole tensor: only the first axis longer than 1 is cut."""
        taken = index_shape(self.index)
        if taken != self.shape or 0 in taken or any(len(intervals) > 1 for intervals in self.index):
            return False
        cut = [axis for axis, size in enumerate(taken) if size < self.spec.orig_shape[axis]]
        return not cut or all(size == 1 for size in taken[: cut[-1]])


@frozen
class Nothing:
    """The step is not for this rank."""


@frozen
class OpenGroups:
    """Take part in making every group along each of these sets of mesh axes, and of each number of neighbours."""

    over: tuple[tuple[MeshAxis, ...], ...]
    sharing: tuple[tuple[MeshAxis, int], ...]
    num_groups: int


@frozen
class OpenTieGroups:
    """Take part in making, for each of these sets of places along ``pipe``, the groups of ranks that differ in it only."""

    between: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[tuple[int, ...], ...], ...]


@frozen
class Make:
    """Allocate whole tensors, lend them to the module at ``paths``, run the calls in order, keep them."""

    paths: tuple[str, ...]
    pieces: tuple[Piece, ...]
    scratch: tuple[Piece, ...]
    calls: tuple[Call, ...]
    key: str


@frozen
class Evaluate:
    """Allocate parts and give them the values of their init programs."""

    pieces: tuple[Piece, ...]


@frozen
class Take:
    """Copy parts of the values that this rank's module has."""

    pieces: tuple[Piece, ...]


@frozen
class ReadParts:
    """Allocate parts and read them from the plan's folder."""

    pieces: tuple[Piece, ...]


@frozen
class ReadOwn:
    """Allocate parts and read them from this rank's own file in the plan's folder."""

    pieces: tuple[Piece, ...]


@frozen
class Reserve:
    """Allocate parts and leave them uninitialised."""

    pieces: tuple[Piece, ...]


@frozen
class Exchange:
    """One collective message.

    Args:
        op: What it is.
        mesh_axes: Mesh axes that the group spans.
        group: Ranks of the group; the first one sends.
        is_root: Whether this rank is the first.
        pieces: What this rank holds of each tensor afterwards.
        parts: For the sender of a scatter, what each member gets, in the order of the group.
        between: Places along ``pipe`` of a group that joins two stages; else empty.
        room: Elements of each message, where the members get different numbers of them; else 0.
    """

    op: Literal["broadcast", "scatter"]
    mesh_axes: tuple[MeshAxis, ...]
    group: range
    is_root: bool
    pieces: tuple[Piece, ...]
    parts: tuple[tuple[Piece, ...], ...] = ()
    between: tuple[int, ...] = ()
    room: int = 0

    @property
    def dtype(self) -> str:
        """The element type of all tensors of a message."""
        return self.pieces[0].spec.dtype


@frozen
class Cut:
    """Keep a part of each whole tensor."""

    pieces: tuple[Piece, ...]


@frozen
class Install:
    """Make tensors those of the module."""

    specs: tuple[ParamSpec, ...]


@frozen
class Alias:
    """Make one tensor stand under its other paths again."""

    spec: ParamSpec
    aliases: tuple[str, ...]


@frozen
class Change:
    """Change how a module computes."""

    step: LayoutStep


@frozen
class Distribute:
    """Make the module's tensors DTensors over a device mesh with these dimensions."""

    mesh_axes: tuple[MeshAxis, ...]
    specs: tuple[ParamSpec, ...]


@frozen
class Hand:
    """Hand the module to the target."""

    target: str | None


@frozen
class KeepStages:
    """Keep the stages that this rank runs."""

    place: int


@frozen
class SumGradients:
    """Note a trained tensor whose gradients are summed over stages, this rank's among them."""

    spec: ParamSpec
    between: tuple[int, ...]


Work = (
    Nothing
    | Agree
    | MakeOptimizer
    | OpenGroups
    | OpenTieGroups
    | KeepStages
    | SumGradients
    | Make
    | Evaluate
    | Take
    | ReadParts
    | ReadOwn
    | CheckLoaded
    | Reserve
    | Exchange
    | Cut
    | Install
    | Alias
    | Change
    | Distribute
    | Hand
)


def resolve(step: Step, coordinate: Coordinate, tree: SpecTree) -> Work:  # noqa: C901, PLR0911, PLR0912  one case a step
    """Return what a step asks of the rank at ``coordinate``: the one place where ranks and intervals are computed.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard, SpecTree
    >>> tree = SpecTree([ParamSpec("up.weight", (8, 4), "float32", shards=(Shard(0),))])
    >>> work = resolve(Scatter(stage=0, paths=("up.weight",), over=("tensor",)), Mesh(tensor=4).coordinate(2), tree)
    >>> work.group, work.is_root, work.pieces[0].index
    (range(0, 4), False, (((4, 6),), ((0, 4),)))
    """
    match step:
        case Agree() | CheckLoaded() | MakeOptimizer():
            return step
        case AsDTensors(mesh_axes=mesh_axes):
            return Distribute(mesh_axes, tuple(tree.values()))
        case Wrap(target=target):
            return Hand(target)
        case MakeGroups(over=over, sharing=sharing):
            mesh = coordinate.mesh
            made = [*(mesh.groups(*mesh_axes) for mesh_axes in over), *(mesh.neighbours(*pair) for pair in sharing)]
            return OpenGroups(over, sharing, sum(map(len, made)))
        case MakeTieGroups(between=between):
            return OpenTieGroups(between, tuple(tuple(_tied_ranks(coordinate.mesh, places)) for places in between))
        case SetAttributes() | SetToLocalSize() | VocabParallel() | AddBiasAfterSync() | Sync():
            return Change(step)
        case SumGradient() | DispatchTokens() | ForkRng() | MaskPadding():
            return Change(step)
        case TakeStages():
            return KeepStages(coordinate.pipe)
        case SumTied(path=path, between=between):
            return SumGradients(tree[path], between) if coordinate.pipe in between else Nothing()
        case SendCopy(paths=()) | Scatter(paths=()) | Broadcast(paths=()):
            return Nothing()
        case SendCopy(stage=stage, to=to, paths=paths):
            if coordinate.pipe not in (stage, to):
                return Nothing()
            first, second = (_rank_at(coordinate, place) for place in (stage, to))
            group, is_root = range(first, 2 * second - first, second - first), coordinate.pipe == stage
            return Exchange("broadcast", ("pipe",), group, is_root, _parts(tree, paths, coordinate), between=(stage, to))
        case _ if step.stage != coordinate.pipe:
            return Nothing()
        case Generate(paths=paths, calls=calls, scratch=scratch, key=key):
            if not coordinate.is_first(*STAGE_AXES):
                return Nothing()
            return Make(paths, _whole(tree, paths), _whole(tree, scratch), calls, key)
        case EvaluateWhole(paths=paths):
            return Evaluate(_whole(tree, paths)) if coordinate.is_first(*STAGE_AXES) else Nothing()
        case EvaluateShard(paths=paths):
            return Evaluate(_parts(tree, paths, coordinate))
        case TakeWhole(paths=paths):
            return Take(_whole(tree, paths)) if coordinate.is_first(*STAGE_AXES) else Nothing()
        case TakeShard(paths=paths):
            return Take(_parts(tree, paths, coordinate))
        case LoadShard(paths=paths, over=over):
            return ReadParts(_parts(tree, paths, coordinate)) if coordinate.is_first(*over) else Nothing()
        case LoadOwn(paths=paths):
            return ReadOwn(_parts(tree, paths, coordinate))
        case Allocate(paths=paths):
            return Reserve(_parts(tree, paths, coordinate))
        case Scatter(paths=paths, over=over):
            return _scatter(_parts(tree, paths, coordinate), over, coordinate)
        case Broadcast(paths=paths, over=over):
            pieces = tuple(_travelling(tree[path], over, coordinate) for path in paths)
            return Exchange("broadcast", over, coordinate.group(*over), coordinate.is_first(*over), pieces)
        case Slice(paths=paths):
            return Cut(_parts(tree, paths, coordinate))
        case Place(paths=paths):
            return Install(tuple(tree[path] for path in paths))
        case Tie(path=path, aliases=aliases):
            return Alias(tree[path], aliases)
        case _:
            assert_never(step)


def _tied_ranks(mesh: Mesh, places: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Iterate over the groups of ranks that stand at some places along ``pipe`` and are alike otherwise."""
    return (tuple(_rank_at(mesh.coordinate(rank), place) for place in places) for rank in mesh.stage(0))


def _rank_at(coordinate: Coordinate, place: int) -> int:
    return evolve(coordinate, pipe=place).rank


def _scatter(pieces: tuple[Piece, ...], over: tuple[MeshAxis, ...], coordinate: Coordinate) -> Work:
    if not coordinate.is_first(*unsplit(STAGE_AXES, over)):
        return Nothing()
    group, is_root = coordinate.group(*over), coordinate.is_first(*over)
    parts: tuple[tuple[Piece, ...], ...] = ()
    if is_root:
        members = map(coordinate.mesh.coordinate, group)
        parts = tuple(tuple(Piece.part(p.spec, member) for p in pieces) for member in members)
    return Exchange("scatter", over, group, is_root, pieces, parts, room=_room(pieces, coordinate))


def _room(pieces: tuple[Piece, ...], coordinate: Coordinate) -> int:
    """Return the elements of the first member's message, the longest one, where others may be shorter; else 0."""
    mesh = coordinate.mesh
    uneven = any(not shard.is_even(p.spec.orig_shape[shard.axis], mesh) for p in pieces for shard in p.spec.shards)
    return sum(prod(p.spec.local_shape(mesh.coordinate(0))) for p in pieces) if uneven else 0


def _travelling(spec: ParamSpec, over: tuple[MeshAxis, ...], coordinate: Coordinate) -> Piece:
    if set(factors(*spec.mesh_axes(coordinate))) & set(factors(*over)):
        return Piece.whole(spec)
    return Piece.part(spec, coordinate)


def _whole(tree: SpecTree, paths: tuple[str, ...]) -> tuple[Piece, ...]:
    return tuple(Piece.whole(tree[path]) for path in paths)


def _parts(tree: SpecTree, paths: tuple[str, ...], coordinate: Coordinate) -> tuple[Piece, ...]:
    return tuple(Piece.part(tree[path], coordinate) for path in paths)
