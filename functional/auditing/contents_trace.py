"""A dry run that also notes what lies in every tensor: the evidence for the proofs. No torch."""

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
"""How values came to a rank: its own evaluation of an init program, init code, a file, the module's values of the first
rank or of each, nobody, or a message."""


@frozen
class Content:
    """A part of one tensor, and how it came to this rank."""

    path: str
    index: Index
    origin: Origin


class Value(int):
    """What stands for a tensor: its number of bytes, and what lies in it, in order."""

    contents: tuple[Content, ...] = ()


@frozen
class Call:
    """One collective, as a member sees it: all members must see the same.

    Args:
        step: Which step of the plan.
        op: What it is.
        mesh_axes: Mesh axes that the group spans.
        between: Places along ``pipe`` of a group that joins two stages.
        num_ranks: Members.
        num_bytes: Bytes that each member gets.
        broadcast: What all members get; empty for a scatter, of which each gets its own.
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
    """What one rank did, in a dry run.

    Args:
        coordinate: Where it stands.
        calls: Its collectives.
        made: What it made or took, not what was sent to it.
        installed: What became its module's, by canonical path; several where it was installed more than once.
        aliases: Paths that became the same object as a canonical one.
        summed: Tensors whose gradients it sums over places along ``pipe``.
        groups: Sets of mesh axes, and of places along ``pipe``, along which it has a group.
        wrong: Messages and cuts whose contents are not what the step says: path and cause.
    """

    coordinate: Coordinate | None = None
    calls: list[Call] = Factory(list)
    made: list[Content] = Factory(list)
    installed: dict[str, list[tuple[Content, ...]]] = Factory(dict)
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
            self.wrong.insert(0, _stopped(error))  # all that is wrong besides may follow from it
        self.calls.append(Call(self.step, "agree", (), (), plan.mesh.num_ranks, 0))

    def make_groups(self, task: work.MakeGroups) -> None:
        super().make_groups(task)
        self.groups.update(task.over)
        self.groups.update((mesh_axis, str(num)) for mesh_axis, num in task.sharing)

    def make_tie_groups(self, task: work.MakeTieGroups) -> None:
        super().make_tie_groups(task)
        self.groups.update(task.between)

    def generate(self, task: work.Generate, seed: int) -> Sequence[Value]:
        return [self._made(num, piece, "code") for num, piece in zip(super().generate(task, seed), task.pieces, strict=True)]

    def evaluate(self, pieces: Sequence[work.Piece], seed: int) -> Sequence[Value]:
        return [self._made(num, p, "program") for num, p in zip(super().evaluate(pieces, seed), pieces, strict=True)]

    def take(self, piece: work.Piece) -> Value:
        origin = "module" if isinstance(piece.spec.source, ModuleValues) else "own"
        return self._made(super().take(piece), piece, origin)

    def load_shard(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[Value]:
        return [self._made(num, p, "file") for num, p in zip(super().load_shard(pieces, folder), pieces, strict=True)]

    def load_own(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[Value]:
        return [self._made(num, p, "file") for num, p in zip(super().load_own(pieces, folder), pieces, strict=True)]

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        super().check_loaded(plan, failed=failed)
        self.calls.append(Call(self.step, "all_reduce", (), (), plan.mesh.num_ranks, 0))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Value:
        return Value(super().allocate(shape, dtype))

    def slice(self, whole: int, piece: work.Piece) -> Value:
        return _holding(super().slice(whole, piece), self._part(whole, piece))

    def view(self, whole: int, piece: work.Piece) -> Value:
        return _holding(super().view(whole, piece), self._part(whole, piece))

    def pack(self, tensors: Sequence[tuple[int, work.Piece | None]], num_elements: int, dtype: str) -> Value:
        parts = [_contents(whole) if piece is None else self._part(whole, piece) for whole, piece in tensors]
        return _holding(super().pack(tensors, num_elements, dtype), tuple(content for part in parts for content in part))

    def unpack(self, buffer: int, pieces: Sequence[work.Piece]) -> list[int]:
        contents = _contents(buffer)
        values = [Value(num) for num in super().unpack(buffer, pieces)]
        for value, content in zip(values, contents, strict=False):
            value.contents = (content,)
        return [*values]

    def broadcast(self, buffer: int, message: work.Message) -> None:
        super().broadcast(buffer, message)
        told = tuple((piece.path, piece.index) for piece in message.pieces)
        self._call(message, told)
        self._exchange(buffer, message)

    def scatter(self, buffer: int, parts: Sequence[int], message: work.Message) -> None:
        super().scatter(buffer, parts, message)
        self._call(message, ())
        for part, pieces in zip(parts, message.parts, strict=False):
            self._compare(_contents(part), pieces, "sends")
        assert isinstance(buffer, Value), "the buffer was allocated here"
        buffer.contents = tuple(Content(p.path, p.index, "sent") for p in message.pieces)

    def place(self, spec: ParamSpec, tensor: int) -> None:
        super().place(spec, tensor)
        self.installed.setdefault(spec.path, []).append(_contents(tensor))

    def tie(self, task: work.Tie) -> None:
        self.aliases[task.spec.path] = task.aliases if task.spec.path in self.installed else ()

    def sum_tied(self, task: work.SumTied) -> None:
        self.summed[task.spec.path] = task.between

    def _made(self, num_bytes: int, piece: work.Piece, origin: Origin) -> Value:
        content = Content(piece.path, piece.index, origin)
        self.made.append(content)
        return _holding(num_bytes, (content,))

    def _part(self, whole: int, piece: work.Piece) -> tuple[Content, ...]:
        """Return what a part holds that is cut from a whole tensor."""
        for content in _contents(whole):
            if content.path == piece.path and _covers(content.index, piece.index):
                return (Content(piece.path, piece.index, content.origin),)
        self.wrong.append((piece.path, "a part is cut from what does not hold it"))
        return ()

    def _exchange(self, buffer: int, message: work.Message) -> None:
        assert isinstance(buffer, Value), "the buffer was allocated here"
        if message.is_root:
            self._compare(buffer.contents, message.pieces, "sends")
        else:
            buffer.contents = tuple(Content(p.path, p.index, "sent") for p in message.pieces)

    def _compare(self, contents: Sequence[Content], pieces: Sequence[work.Piece], verb: str) -> None:
        found = [(content.path, content.index) for content in contents]
        for number, piece in enumerate(pieces):
            if number >= len(found) or found[number] != (piece.path, piece.index):
                self.wrong.append((piece.path, f"it {verb} another part than the step says"))

    def _call(self, message: work.Message, told: tuple[tuple[str, Index], ...]) -> None:
        num_bytes = message.num_bytes
        axes, between = message.mesh_axes, message.between
        self.calls.append(Call(self.step, message.op, axes, between, len(message.group), num_bytes, told))


Traces = dict["Coordinate", Trace]


def trace(plan: Plan, distinct: Distinct) -> Traces:
    """Return what the ranks of each distinct coordinate do."""
    return {coordinate: _trace(plan, coordinate) for coordinate, _ in distinct.places()}


def _trace(plan: Plan, coordinate: Coordinate) -> Trace:
    effects = Trace(coordinate.rank, coordinate=coordinate)
    interpret(plan, coordinate, effects, on_step=effects.next_step)
    return effects


def _stopped(error: BaseException) -> tuple[str, str]:
    """Return what stops the interpreter: a tensor that a step takes up and the rank has not, or another error."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0]), "a step takes it up, and the rank does not hold it by then"
    return "", f"the interpreter stops: {type(error).__name__}: {error}"


def _holding(num_bytes: int, contents: tuple[Content, ...]) -> Value:
    value = Value(num_bytes)
    value.contents = contents
    return value


def _contents(tensor: int) -> tuple[Content, ...]:
    assert isinstance(tensor, Value), "every tensor of a trace is one"
    return tensor.contents


def _covers(outer: Index, inner: Index) -> bool:
    """Tell whether a part lies within another."""
    return all(
        all(any(start <= first and last <= stop for start, stop in whole) for first, last in part)
        for whole, part in zip(outer, inner, strict=True)
    )
