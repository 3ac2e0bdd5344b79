"""A dry run that also tracks the contents of every tensor: the evidence for the proofs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import Factory, define, frozen

from ...specs.source import ModuleValues
from ..interpreter.dry_run import DryRun
from ..interpreter.interpret import interpret

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...specs.distinct_ranks import Distinct
    from ...specs.index import Index
    from ...specs.mesh import Coordinate, MeshAxis
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.steps import Step
    from ...specs.stored import Folder
    from ..interpreter import work

Origin = Literal["program", "code", "file", "module", "own", "nothing", "sent"]
"""Where a rank has values from: its own evaluation of an init program, init code, a file, the module of a stage's first
rank, its own module, no step, or a message."""


@frozen
class Content:
    """A part of one tensor, and its origin on this rank."""

    path: str
    index: Index
    origin: Origin


class TracedTensor(int):
    """A stand-in for a tensor: its number of bytes, and its contents in order."""

    contents: tuple[Content, ...] = ()


@frozen
class JoinedCollective:
    """One collective that a rank takes part in; all members of the group must agree on it.

    Args:
        step: Number of the step in the plan.
        op: Name of the collective.
        mesh_axes: Mesh axes that the group spans.
        between: Places along ``pipe`` of a group that joins two stages.
        num_ranks: Number of members.
        num_bytes: Bytes that each member gets.
        broadcast: The parts that all members get, by path and index; empty for a scatter.
    """

    step: int
    op: str
    mesh_axes: tuple[MeshAxis, ...]
    between: tuple[int, ...]
    num_ranks: int
    num_bytes: int
    broadcast: tuple[tuple[str, Index], ...] = ()


@define
class Trace(DryRun):
    """The dry run of one rank.

    Args:
        coordinate: The rank's coordinate.
        collectives: Its collectives, in order.
        made: The parts that it made, loaded or took, received parts excluded.
        placed: Contents of the tensors that it placed, by canonical path; several if a tensor was placed more than once.
        aliases: Paths tied to a canonical path.
        summed: Places along ``pipe`` over which it sums the gradient of a tied tensor, by path.
        groups: Sets of mesh axes, and of places along ``pipe``, along which it has a process group.
        wrong: Path and cause of each message or slice whose contents differ from the step's.
        step: Number of the step that it is at.
    """

    coordinate: Coordinate | None = None
    collectives: list[JoinedCollective] = Factory(list)
    made: list[Content] = Factory(list)
    placed: dict[str, list[tuple[Content, ...]]] = Factory(dict)
    aliases: dict[str, tuple[str, ...]] = Factory(dict)
    summed: dict[str, tuple[int, ...]] = Factory(dict)
    groups: set[tuple[str, ...] | tuple[int, ...]] = Factory(set)
    wrong: list[tuple[str, str]] = Factory(list)
    step: int = 0

    def next_step(self, _: Step) -> None:
        """Count the steps."""
        self.step += 1

    def agree(self, plan: Plan, error: BaseException | None) -> None:
        super().agree(plan, None)
        if error is not None:
            self.wrong.insert(0, _stopped(error))  # the other faults may follow from it
        self.collectives.append(JoinedCollective(self.step, "agree", (), (), plan.mesh.num_ranks, 0))

    def make_groups(self, task: work.MakeGroups) -> None:
        super().make_groups(task)
        self.groups.update(task.over)
        self.groups.update((mesh_axis, str(num)) for mesh_axis, num in task.sharing)

    def make_tie_groups(self, task: work.MakeTieGroups) -> None:
        super().make_tie_groups(task)
        self.groups.update(task.between)

    def generate(self, task: work.Generate, seed: int) -> Sequence[TracedTensor]:
        return self._make(super().generate(task, seed), task.pieces, "code")

    def evaluate(self, pieces: Sequence[work.Piece], seed: int) -> Sequence[TracedTensor]:
        return self._make(super().evaluate(pieces, seed), pieces, "program")

    def take(self, piece: work.Piece) -> TracedTensor:
        origin = "module" if isinstance(piece.spec.source, ModuleValues) else "own"
        return self._make([super().take(piece)], [piece], origin)[0]

    def load_shard(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[TracedTensor]:
        return self._make(super().load_shard(pieces, folder), pieces, "file")

    def load_own(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[TracedTensor]:
        return self._make(super().load_own(pieces, folder), pieces, "file")

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        super().check_loaded(plan, failed=failed)
        self.collectives.append(JoinedCollective(self.step, "all_reduce", (), (), plan.mesh.num_ranks, 0))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> TracedTensor:
        return TracedTensor(super().allocate(shape, dtype))

    def slice(self, whole: int, piece: work.Piece) -> TracedTensor:
        return _holding(super().slice(whole, piece), self._part(whole, piece))

    def view(self, whole: int, piece: work.Piece) -> TracedTensor:
        return _holding(super().view(whole, piece), self._part(whole, piece))

    def pack(self, tensors: Sequence[tuple[int, work.Piece | None]], num_elements: int, dtype: str) -> TracedTensor:
        parts = [_contents(whole) if piece is None else self._part(whole, piece) for whole, piece in tensors]
        return _holding(super().pack(tensors, num_elements, dtype), tuple(content for part in parts for content in part))

    def unpack(self, buffer: int, pieces: Sequence[work.Piece]) -> list[int]:
        contents, tensors = _contents(buffer), super().unpack(buffer, pieces)
        return [_holding(num_bytes, contents[number : number + 1]) for number, num_bytes in enumerate(tensors)]

    def broadcast(self, buffer: int, message: work.Message) -> None:
        super().broadcast(buffer, message)
        self._note(message, broadcast=tuple((piece.path, piece.index) for piece in message.pieces))
        if message.is_root:
            self._check_sent(buffer, message.pieces)
        else:
            _receive(buffer, message.pieces)

    def scatter(self, buffer: int, parts: Sequence[int], message: work.Message) -> None:
        super().scatter(buffer, parts, message)
        self._note(message)
        for part, pieces in zip(parts, message.parts, strict=False):
            self._check_sent(part, pieces)
        _receive(buffer, message.pieces)

    def place(self, spec: ParamSpec, tensor: int) -> None:
        super().place(spec, tensor)
        self.placed.setdefault(spec.path, []).append(_contents(tensor))

    def tie(self, task: work.Tie) -> None:
        self.aliases[task.spec.path] = task.aliases if task.spec.path in self.placed else ()

    def sum_tied(self, task: work.SumTied) -> None:
        self.summed[task.spec.path] = task.between

    def _make(self, sizes: Sequence[int], pieces: Sequence[work.Piece], origin: Origin) -> list[TracedTensor]:
        contents = [Content(piece.path, piece.index, origin) for piece in pieces]
        self.made += contents
        return [_holding(num_bytes, (content,)) for num_bytes, content in zip(sizes, contents, strict=True)]

    def _part(self, whole: int, piece: work.Piece) -> tuple[Content, ...]:
        """Return the contents of a part that is cut from a whole tensor."""
        for content in _contents(whole):
            if content.path == piece.path and _covers(content.index, piece.index):
                return (Content(piece.path, piece.index, content.origin),)
        self.wrong.append((piece.path, "a part is cut from what does not hold it"))
        return ()

    def _check_sent(self, buffer: int, pieces: Sequence[work.Piece]) -> None:
        sent = [(content.path, content.index) for content in _contents(buffer)]
        for number, piece in enumerate(pieces):
            if number >= len(sent) or sent[number] != (piece.path, piece.index):
                self.wrong.append((piece.path, "it sends another part than the step says"))

    def _note(self, message: work.Message, broadcast: tuple[tuple[str, Index], ...] = ()) -> None:
        group = message.mesh_axes, message.between, len(message.group)
        self.collectives.append(JoinedCollective(self.step, message.op, *group, message.num_bytes, broadcast))


Traces = dict["Coordinate", Trace]


def trace(plan: Plan, distinct: Distinct) -> Traces:
    """Return the trace of each distinct coordinate."""
    return {coordinate: _trace(plan, coordinate) for coordinate, _ in distinct.places()}


def _trace(plan: Plan, coordinate: Coordinate) -> Trace:
    effects = Trace(coordinate.rank, coordinate=coordinate)
    interpret(plan, coordinate, effects, on_step=effects.next_step)
    return effects


def _stopped(error: BaseException) -> tuple[str, str]:
    """Return path and cause of the error that stops the interpreter, e.g. a tensor that a step uses and the rank lacks."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0]), "a step takes it up, and the rank does not hold it by then"
    return "", f"the interpreter stops: {type(error).__name__}: {error}"


def _holding(num_bytes: int, contents: tuple[Content, ...]) -> TracedTensor:
    value = TracedTensor(num_bytes)
    value.contents = contents
    return value


def _receive(buffer: int, pieces: Sequence[work.Piece]) -> None:
    assert isinstance(buffer, TracedTensor), "every buffer of a trace is traced"
    buffer.contents = tuple(Content(piece.path, piece.index, "sent") for piece in pieces)


def _contents(tensor: int) -> tuple[Content, ...]:
    assert isinstance(tensor, TracedTensor), "every tensor of a trace is traced"
    return tensor.contents


def _covers(outer: Index, inner: Index) -> bool:
    """Tell whether the outer part contains the inner."""
    return all(
        all(any(start <= first and last <= stop for start, stop in whole) for first, last in part)
        for whole, part in zip(outer, inner, strict=True)
    )
