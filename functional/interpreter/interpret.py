"""The interpreter: the steps of a plan, carried out for one rank by any effects.

With ``TorchEffects`` it fills a module; with ``DryRun`` it predicts the receipt. Both run this code, so that the prediction
cannot drift from the execution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, assert_never
from typing import ParamSpec as Arguments

from attrs import Factory, define

from ...specs.errors import PlanError
from . import work
from .resolve import resolve

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.plan import Plan
    from ...specs.steps import Step
    from ...specs.stored import Folder
    from .effects import Effects

T = TypeVar("T")
R = TypeVar("R")
P = Arguments("P")


def interpret(
    plan: Plan,
    coordinate: Coordinate,
    effects: Effects[T],
    *,
    error: BaseException | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> dict[str, T]:
    """Carry out the steps of a plan for the rank at ``coordinate``; return the tensors that no step has placed, by path.

    Args:
        plan: The plan.
        coordinate: The rank's coordinate.
        effects: The effects, real or dry.
        error: An error of this rank from before; the opening agreement tells all ranks.
        on_step: Called after each step.

    Raises:
        Exception: The first error of any rank, raised by the effects' agreement.
    """
    rank = _Rank(plan, effects, error)
    for step in plan.steps:
        task = resolve(step, coordinate, plan.tree)
        if task.collective:
            rank.carry_out(task)
        else:
            rank.attempt(rank.carry_out, task)
        on_step(step)
    return rank.held


@define
class _Rank(Generic[T]):
    """One rank on its way through a plan.

    After an error it skips all work but collectives: other ranks wait for those, and the closing agreement tells them why.

    Args:
        plan: The plan.
        effects: Its effects.
        error: Its first error.
        held: The tensors that it has made or received and not yet placed, by canonical path.
    """

    plan: Plan
    effects: Effects[T]
    error: BaseException | None
    held: dict[str, T] = Factory(dict)

    def attempt(self, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Return the action's result; keep its error. After an error do nothing."""
        if self.error is not None:
            return None
        try:
            return action(*args, **kwargs)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever fails here, other ranks wait for messages to come
            self.error = error
            self.held.clear()
            return None

    def carry_out(self, task: work.Work) -> None:  # noqa: C901, PLR0912  one case a kind of work
        match task:
            case work.Nothing():
                pass
            case work.Agree():
                self.effects.agree(self.plan, self.error)
            case work.MakeGroups():
                self.effects.make_groups(task)
            case work.MakeTieGroups():
                self.effects.make_tie_groups(task)
            case work.Generate(pieces=pieces):
                self.hold(pieces, self.effects.generate(task, self.plan.seed))
            case work.Evaluate(pieces=pieces):
                self.hold(pieces, self.effects.evaluate(pieces, self.plan.seed))
            case work.Take(pieces=pieces):
                self.hold(pieces, [self.effects.take(piece) for piece in pieces])
            case work.LoadShard(pieces=pieces):
                self.hold(pieces, self.effects.load_shard(pieces, self.folder))
            case work.LoadOwn(pieces=pieces):
                self.hold(pieces, self.effects.load_own(pieces, self.folder))
            case work.CheckLoaded():
                self.check_loaded()
            case work.Allocate(pieces=pieces):
                self.hold(pieces, [self.effects.allocate(piece.shape, piece.spec.dtype) for piece in pieces])
            case work.Message(op="broadcast"):
                self.broadcast(task)
            case work.Message():
                self.scatter(task)
            case work.Slice(pieces=pieces):
                self.slice(pieces)
            case work.Place(specs=specs):
                for spec in specs:
                    self.effects.place(spec, self.held.pop(spec.path))
            case work.Tie():
                self.effects.tie(task)
            case work.ChangeLayout(step=step):
                self.effects.change_layout(step)
            case work.TakeStages():
                self.effects.take_stages(self.plan, task)
            case work.SumTied():
                self.effects.sum_tied(task)
            case work.AsDTensors():
                self.effects.as_dtensors(task)
            case work.MakeOptimizer():
                self.effects.make_optimizer()
            case work.Wrap():
                self.effects.wrap(self.plan)
            case _:
                assert_never(task)

    @property
    def folder(self) -> Folder:
        assert self.plan.folder is not None, "steps that read files are planned with their folder"
        return self.plan.folder

    def check_loaded(self) -> None:
        try:
            self.effects.check_loaded(self.plan, failed=self.error is not None)
        except PlanError as error:
            self.error = self.error or error

    def slice(self, pieces: Sequence[work.Piece]) -> None:
        for piece in pieces:
            part = self.effects.slice(self.held[piece.path], piece)
            self.drop(piece.path)
            self.held[piece.path] = part

    def broadcast(self, message: work.Message) -> None:
        """Fill a buffer, broadcast it, and take the pieces out; after an error only broadcast."""
        buffer = self.attempt(self.broadcast_buffer, message)
        if buffer is None:
            buffer = self.new_buffer(message, message.pieces)
        self.effects.broadcast(buffer, message)
        self.attempt(self.finish_broadcast, message, buffer)

    def broadcast_buffer(self, message: work.Message) -> T:
        if not message.is_root:
            return self.new_buffer(message, message.pieces)
        if len(message.pieces) == 1:
            return self.held[message.pieces[0].path]
        return self.effects.pack([(self.held[p.path], None) for p in message.pieces], message.num_elements, message.dtype)

    def finish_broadcast(self, message: work.Message, buffer: T) -> None:
        if not message.is_root:
            self.receive(message, buffer)
        elif len(message.pieces) > 1:
            self.effects.free(buffer)

    def scatter(self, message: work.Message) -> None:
        """Fill a buffer for each member, scatter them, and take the pieces out; after an error only scatter."""
        buffers = self.attempt(self.scatter_buffers, message)
        if buffers is None:
            parts = [self.new_buffer(message, pieces) for pieces in message.parts]
            buffers = self.new_buffer(message, message.pieces), parts
        buffer, parts = buffers
        self.effects.scatter(buffer, parts, message)
        self.attempt(self.finish_scatter, message, buffer, parts)

    def scatter_buffers(self, message: work.Message) -> tuple[T, list[T]]:
        parts = [self.part(message, pieces) for pieces in message.parts]
        return self.new_buffer(message, message.pieces), parts

    def finish_scatter(self, message: work.Message, buffer: T, parts: list[T]) -> None:
        for pieces in reversed(message.parts):
            part = parts.pop()
            if not _is_sent_as_view(message, pieces):
                self.effects.free(part)
        if message.is_root:
            for piece in message.pieces:
                self.drop(piece.path)
        self.receive(message, buffer)

    def part(self, message: work.Message, pieces: Sequence[work.Piece]) -> T:
        """Return the buffer that one member of a scatter gets: a view or copy of one tensor, or several packed in a row."""
        if shape := _flat_shape(message, pieces):
            return self.effects.pack([(self.held[piece.path], piece) for piece in pieces], shape[0], message.dtype)
        whole = self.held[pieces[0].path]
        is_view = _is_sent_as_view(message, pieces)
        return self.effects.view(whole, pieces[0]) if is_view else self.effects.slice(whole, pieces[0])

    def new_buffer(self, message: work.Message, pieces: Sequence[work.Piece]) -> T:
        """Allocate a buffer for some pieces of a message."""
        return self.effects.allocate(_flat_shape(message, pieces) or pieces[0].shape, message.dtype)

    def receive(self, message: work.Message, buffer: T) -> None:
        if _flat_shape(message, message.pieces):
            self.hold(message.pieces, self.effects.unpack(buffer, message.pieces))
            self.effects.free(buffer)
        else:
            self.hold(message.pieces, [buffer])

    def hold(self, pieces: Sequence[work.Piece], tensors: Sequence[T]) -> None:
        self.held.update(zip((piece.path for piece in pieces), tensors, strict=True))

    def drop(self, path: str) -> None:
        self.effects.free(self.held.pop(path))


def _flat_shape(message: work.Message, pieces: Sequence[work.Piece]) -> tuple[int] | None:
    """Return the shape of the flat buffer in which some pieces of a message travel; None if a lone piece is the buffer."""
    if message.pad_to:
        return (message.pad_to,)
    return (sum(piece.num_elements for piece in pieces),) if len(pieces) > 1 else None


def _is_sent_as_view(message: work.Message, pieces: Sequence[work.Piece]) -> bool:
    return _flat_shape(message, pieces) is None and pieces[0].is_contiguous
