"""The work that a step asks of one rank: a record with the step's own name.

Work that several steps share has a name of its own: ``Message``, ``Evaluate``, ``Take``, ``ChangeLayout``. A record's
``collective`` says whether other ranks wait for it; if so a rank takes part in it even after an error of its own.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import frozen

from ...specs.dtypes import num_bytes
from ...specs.index import Index, index_shape, whole_index
from ...specs.param import ParamSpec

if TYPE_CHECKING:
    from ...specs.layout_steps import LayoutStep
    from ...specs.mesh import Coordinate, MeshAxis
    from ...specs.source import Call


@frozen
class Piece:
    """A part of one tensor, as a rank allocates or sends it.

    Args:
        spec: The tensor.
        index: The part, as intervals along each axis.
        shape: Shape of the part; if its first axis is longer than the intervals, zeros follow.
    """

    spec: ParamSpec
    index: Index
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, spec: ParamSpec) -> Piece:
        """Return the whole tensor as a piece."""
        return cls(spec, whole_index(spec.orig_shape), spec.orig_shape)

    @classmethod
    def part(cls, spec: ParamSpec, coordinate: Coordinate) -> Piece:
        """Return the shard of a coordinate."""
        return cls(spec, spec.index(coordinate), spec.local_shape(coordinate))

    @property
    def path(self) -> str:
        """Canonical path of the tensor."""
        return self.spec.path

    @property
    def num_elements(self) -> int:
        """Elements of the part, padding included."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the part, padding included."""
        return self.num_elements * num_bytes(self.spec.dtype)

    @property
    def is_contiguous(self) -> bool:
        """Whether the part is contiguous in the whole tensor: only the first axis longer than 1 is cut."""
        taken = index_shape(self.index)
        if taken != self.shape or 0 in taken or any(len(intervals) > 1 for intervals in self.index):
            return False
        cut = [axis for axis, size in enumerate(taken) if size < self.spec.orig_shape[axis]]
        return not cut or all(size == 1 for size in taken[: cut[-1]])


@frozen
class Nothing:
    """The step is not for this rank."""

    collective: ClassVar[bool] = False


@frozen
class Agree:
    """Tell all ranks whether this rank can go on."""

    collective: ClassVar[bool] = True


@frozen
class MakeGroups:
    """Take part in making every process group along these sets of mesh axes, and of these numbers of neighbours."""

    collective: ClassVar[bool] = True
    over: tuple[tuple[MeshAxis, ...], ...]
    sharing: tuple[tuple[MeshAxis, int], ...]
    num_groups: int


@frozen
class MakeTieGroups:
    """For each set of places along ``pipe``, take part in making the groups of ranks that differ only in their place."""

    collective: ClassVar[bool] = True
    between: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[tuple[int, ...], ...], ...]


@frozen
class Generate:
    """Run init code on whole tensors that are lent to the module, and keep the tensors at ``paths``."""

    collective: ClassVar[bool] = False
    paths: tuple[str, ...]
    pieces: tuple[Piece, ...]
    scratch: tuple[Piece, ...]
    calls: tuple[Call, ...]
    key: str


@frozen
class Evaluate:
    """Allocate pieces and evaluate their init programs: ``EvaluateShard`` and ``EvaluateWhole``."""

    collective: ClassVar[bool] = False
    pieces: tuple[Piece, ...]


@frozen
class Take:
    """Copy pieces of the values that this rank's module has: ``TakeShard`` and ``TakeWhole``."""

    collective: ClassVar[bool] = False
    pieces: tuple[Piece, ...]


@frozen
class LoadShard:
    """Allocate pieces and read them from the plan's folder."""

    collective: ClassVar[bool] = False
    pieces: tuple[Piece, ...]


@frozen
class LoadOwn:
    """Allocate pieces and read them from this rank's own file in the plan's folder."""

    collective: ClassVar[bool] = False
    pieces: tuple[Piece, ...]


@frozen
class CheckLoaded:
    """Add up with all ranks the position sums of the loaded tensors, and compare them with the recorded sums."""

    collective: ClassVar[bool] = True


@frozen
class Allocate:
    """Allocate pieces and leave them uninitialised."""

    collective: ClassVar[bool] = False
    pieces: tuple[Piece, ...]


@frozen
class Message:
    """One message from the first rank of a group to all its members: ``Broadcast``, ``Scatter`` and ``SendCopy``.

    Args:
        op: The collective that carries it.
        mesh_axes: Mesh axes that the group spans.
        group: Ranks of the group; the first one sends.
        is_root: Whether this rank is the first.
        pieces: The pieces that this rank holds afterwards.
        parts: For the sender of a scatter, the pieces of each member, in the order of the group.
        between: Places along ``pipe`` of a group that joins two stages; else empty.
        pad_to: Number of elements to which each member's part is padded if parts differ in length; else 0.
    """

    collective: ClassVar[bool] = True
    op: Literal["broadcast", "scatter"]
    mesh_axes: tuple[MeshAxis, ...]
    group: range
    is_root: bool
    pieces: tuple[Piece, ...]
    parts: tuple[tuple[Piece, ...], ...] = ()
    between: tuple[int, ...] = ()
    pad_to: int = 0

    @property
    def dtype(self) -> str:
        """The element type, common to all its tensors."""
        return self.pieces[0].spec.dtype

    @property
    def num_elements(self) -> int:
        """Elements that each member gets, padding included."""
        return self.pad_to or sum(piece.num_elements for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Bytes that each member gets, padding included."""
        return self.num_elements * num_bytes(self.dtype)


@frozen
class Slice:
    """Keep a part of each whole tensor."""

    collective: ClassVar[bool] = False
    pieces: tuple[Piece, ...]


@frozen
class Place:
    """Make the tensors that this rank holds the tensors of its module."""

    collective: ClassVar[bool] = False
    specs: tuple[ParamSpec, ...]


@frozen
class Tie:
    """Put a placed tensor at its other paths too."""

    collective: ClassVar[bool] = False
    spec: ParamSpec
    aliases: tuple[str, ...]


@frozen
class ChangeLayout:
    """Change how a module computes: every layout step."""

    collective: ClassVar[bool] = False
    step: LayoutStep


@frozen
class TakeStages:
    """Keep the stages at this rank's place along ``pipe``."""

    collective: ClassVar[bool] = False
    place: int


@frozen
class SumTied:
    """Note a tied parameter whose gradients are summed over stages, this rank's among them."""

    collective: ClassVar[bool] = False
    spec: ParamSpec
    between: tuple[int, ...]


@frozen
class AsDTensors:
    """Make the module's tensors DTensors over a device mesh with these dimensions."""

    collective: ClassVar[bool] = False
    mesh_axes: tuple[MeshAxis, ...]
    specs: tuple[ParamSpec, ...]


@frozen
class MakeOptimizer:
    """Make the user's optimizer."""

    collective: ClassVar[bool] = False


@frozen
class Wrap:
    """Hand the module to the plan's target, which may communicate."""

    collective: ClassVar[bool] = True


Work = (
    Nothing
    | Agree
    | MakeGroups
    | MakeTieGroups
    | Generate
    | Evaluate
    | Take
    | LoadShard
    | LoadOwn
    | CheckLoaded
    | Allocate
    | Message
    | Slice
    | Place
    | Tie
    | ChangeLayout
    | TakeStages
    | SumTied
    | AsDTensors
    | MakeOptimizer
    | Wrap
)
