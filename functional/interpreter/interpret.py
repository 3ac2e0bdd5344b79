"""The interpreter's loop: the steps of a plan, for one rank, over any effects.

With real effects it fills a module; with dry ones (``dry_run.py``) it predicts the receipt. It is the same code,
so that the prediction cannot drift from what happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, assert_never
from typing import ParamSpec as Arguments

from attrs import Factory, define

from ...specs.dtypes import num_bytes
from ...specs.errors import PlanError
from ...specs.steps import Agree, CheckLoaded, LayoutStep, MakeOptimizer
from .resolve import (
    Alias,
    Change,
    Cut,
    Distribute,
    Evaluate,
    Exchange,
    Hand,
    Install,
    KeepStages,
    Make,
    Nothing,
    OpenGroups,
    OpenTieGroups,
    Piece,
    ReadOwn,
    ReadParts,
    Reserve,
    SumGradients,
    Take,
    Work,
    resolve,
)

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.steps import Step
    from ...specs.stored import Folder
    from .ledger import Ledger

Alone = Make | Evaluate | Take | ReadParts | ReadOwn | Reserve | Cut | Install | Alias | Change | Distribute | MakeOptimizer
"""Work that no other rank waits for."""

T = TypeVar("T")
R = TypeVar("R")
P = Arguments("P")


class Effects(Protocol[T]):
    """What the interpreter can do to the world; ``T`` is a tensor, or what stands for one."""

    ledger: Ledger

    @property
    def rank(self) -> int:
        """The rank that the effects are for."""
        ...

    def agree(self, plan: Plan, error: BaseException | None) -> None:
        """Tell all ranks whether this one can go on; raise the first error of any rank on every rank."""
        ...

    def open_groups(self, work: OpenGroups) -> None:
        """Make process groups."""
        ...

    def open_tie_groups(self, work: OpenTieGroups) -> None:
        """Make process groups that join stages."""
        ...

    def make(self, work: Make, seed: int) -> Sequence[T]:
        """Run init code on whole tensors; return those that are kept."""
        ...

    def evaluate(self, pieces: Sequence[Piece], seed: int) -> Sequence[T]:
        """Allocate parts and give them the values of their init programs."""
        ...

    def take(self, piece: Piece) -> T:
        """Return a copy of a part of what the module has."""
        ...

    def load(self, pieces: Sequence[Piece], folder: Folder) -> Sequence[T]:
        """Allocate parts and read them from files, each in the order of its own."""
        ...

    def load_own(self, pieces: Sequence[Piece], folder: Folder) -> Sequence[T]:
        """Allocate parts and read them from the rank's own file."""
        ...

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        """Add up with all ranks the sums of what was read, and compare them; not where a rank has failed before."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str) -> T:
        """Allocate an uninitialised tensor."""
        ...

    def cut(self, whole: T, piece: Piece) -> T:
        """Return a copy of a part of a whole tensor."""
        ...

    def view(self, whole: T, piece: Piece) -> T:
        """Return a part of a whole tensor that lies in one piece, without a copy."""
        ...

    def pack(self, tensors: Sequence[tuple[T, Piece | None]], room: int, dtype: str) -> T:
        """Copy tensors, or parts of them, into one flat message of ``room`` elements."""
        ...

    def unpack(self, message: T, pieces: Sequence[Piece]) -> list[T]:
        """Copy the tensors out of a flat message."""
        ...

    def broadcast(self, message: T, exchange: Exchange) -> None:
        """Send from the first rank of the group to all."""
        ...

    def scatter(self, message: T, parts: Sequence[T], exchange: Exchange) -> None:
        """Send from the first rank of the group to each its part."""
        ...

    def free(self, tensor: T) -> None:
        """Note that nothing refers to a tensor any more."""
        ...

    def install(self, spec: ParamSpec, tensor: T) -> None:
        """Make a tensor the module's own."""
        ...

    def alias(self, work: Alias) -> None:
        """Tie paths to the tensor that stands under the first."""
        ...

    def change(self, step: LayoutStep) -> None:
        """Change how a module computes."""
        ...

    def keep_stages(self, plan: Plan, work: KeepStages) -> None:
        """Make the stages that this rank runs out of the module."""
        ...

    def sum_gradients(self, work: SumGradients) -> None:
        """Note a tensor whose gradients are summed over stages."""
        ...

    def distribute(self, work: Distribute) -> None:
        """Make the module's tensors DTensors."""
        ...

    def make_optimizer(self) -> None:
        """Make the user's optimizer."""
        ...

    def hand(self, plan: Plan) -> None:
        """Hand the module to the plan's target."""
        ...


def interpret(
    plan: Plan,
    coordinate: Coordinate,
    effects: Effects[T],
    *,
    error: BaseException | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> dict[str, T]:
    """Carry out all steps of a plan for the rank at ``coordinate``; return what no step has placed, by path.

    Args:
        plan: What to do.
        coordinate: For whom.
        effects: With what.
        error: What went wrong before; the opening agreement tells all ranks.
        on_step: Called after each step.

    Raises:
        Exception: The first error of any rank, raised by the effects' agreement.
    """
    run = _Run(plan, effects, error)
    for step in plan.steps:
        run.do(resolve(step, coordinate, plan.tree))
        on_step(step)
    return run.held


@define
class _Run(Generic[T]):
    """One rank on its way through the plan: what it holds, and what went wrong.

    After an error it does nothing of its own any more, but still takes part in each collective that others wait for.
    """

    plan: Plan
    effects: Effects[T]
    error: BaseException | None
    held: dict[str, T] = Factory(dict)

    def do(self, work: Work) -> None:  # noqa: C901, PLR0912  one case a work
        match work:
            case Nothing():
                pass
            case Agree():
                self.effects.agree(self.plan, self.error)
            case OpenGroups():
                self.effects.open_groups(work)
            case OpenTieGroups():
                self.effects.open_tie_groups(work)
            case Exchange(op="broadcast"):
                self.broadcast(work)
            case Exchange():
                self.scatter(work)
            case CheckLoaded():
                self.check_loaded()
            case Hand():
                self.effects.hand(self.plan)
            case KeepStages():
                self.attempt(self.effects.keep_stages, self.plan, work)
            case SumGradients():
                self.attempt(self.effects.sum_gradients, work)
            case Make() | Evaluate() | Take() | ReadParts() | ReadOwn() | Reserve() | Cut() | Install() | Alias():
                self.attempt(self.do_alone, work)
            case Change() | Distribute() | MakeOptimizer():
                self.attempt(self.do_alone, work)
            case _:
                assert_never(work)

    def do_alone(self, work: Alone) -> None:  # noqa: C901, PLR0912  one case a work
        """Do what no other rank waits for."""
        match work:
            case Make(pieces=pieces):
                self.hold(pieces, self.effects.make(work, self.plan.seed))
            case Evaluate(pieces=pieces):
                self.hold(pieces, self.effects.evaluate(pieces, self.plan.seed))
            case Take(pieces=pieces):
                self.hold(pieces, [self.effects.take(piece) for piece in pieces])
            case ReadParts(pieces=pieces):
                self.hold(pieces, self.effects.load(pieces, self.folder))
            case ReadOwn(pieces=pieces):
                self.hold(pieces, self.effects.load_own(pieces, self.folder))
            case Reserve(pieces=pieces):
                self.hold(pieces, [self.effects.empty(piece.shape, piece.spec.dtype) for piece in pieces])
            case Cut(pieces=pieces):
                for piece in pieces:
                    part = self.effects.cut(self.held[piece.path], piece)
                    self.drop(piece.path)
                    self.held[piece.path] = part
            case Install(specs=specs):
                for spec in specs:
                    self.effects.install(spec, self.held.pop(spec.path))
            case Alias():
                self.effects.alias(work)
            case Change(step=step):
                self.effects.change(step)
            case Distribute():
                self.effects.distribute(work)
            case MakeOptimizer():
                self.effects.make_optimizer()
            case _:
                assert_never(work)

    @property
    def folder(self) -> Folder:
        assert self.plan.folder is not None, "what reads files is planned with their folder"
        return self.plan.folder

    def check_loaded(self) -> None:
        """All ranks take part, those that have failed too."""
        try:
            self.effects.check_loaded(self.plan, failed=self.error is not None)
        except PlanError as error:
            self.error = self.error or error

    def broadcast(self, work: Exchange) -> None:
        message = self.attempt(self.to_broadcast, work)
        message = self.message(work.pieces) if message is None else message
        self.effects.broadcast(message, work)
        self.attempt(self.after_broadcast, work, message)

    def to_broadcast(self, work: Exchange) -> T:
        if not work.is_root:
            return self.message(work.pieces)
        if len(work.pieces) == 1:
            return self.held[work.pieces[0].path]
        room = sum(piece.num_elements for piece in work.pieces)
        return self.effects.pack([(self.held[piece.path], None) for piece in work.pieces], room, work.dtype)

    def after_broadcast(self, work: Exchange, message: T) -> None:
        if not work.is_root:
            self.receive(message, work.pieces)
        elif len(work.pieces) > 1:
            self.effects.free(message)

    def scatter(self, work: Exchange) -> None:
        prepared = self.attempt(self.to_scatter, work)
        if prepared is None:
            prepared = self.message(work.pieces, work.room), [self.message(pieces, work.room) for pieces in work.parts]
        message, parts = prepared
        self.effects.scatter(message, parts, work)
        self.attempt(self.after_scatter, work, message, parts)

    def to_scatter(self, work: Exchange) -> tuple[T, list[T]]:
        parts = [self.part(pieces, work.room) for pieces in work.parts]
        return self.message(work.pieces, work.room), parts

    def after_scatter(self, work: Exchange, message: T, parts: list[T]) -> None:
        for pieces in reversed(work.parts):
            part = parts.pop()
            if not _travels_as_view(pieces, work.room):
                self.effects.free(part)
        if work.is_root:
            for piece in work.pieces:
                self.drop(piece.path)
        self.receive(message, work.pieces, work.room)

    def part(self, pieces: Sequence[Piece], room: int) -> T:
        """What one member of a scatter gets, as one message."""
        if len(pieces) > 1 or room:
            num_elements = room or sum(piece.num_elements for piece in pieces)
            held = [(self.held[piece.path], piece) for piece in pieces]
            return self.effects.pack(held, num_elements, pieces[0].spec.dtype)
        whole = self.held[pieces[0].path]
        return self.effects.view(whole, pieces[0]) if _travels_as_view(pieces, room) else self.effects.cut(whole, pieces[0])

    def message(self, pieces: Sequence[Piece], room: int = 0) -> T:
        """Room for one message: the tensor itself, several in a row, or as many elements as the longest message has."""
        several = room or (sum(piece.num_elements for piece in pieces) if len(pieces) > 1 else 0)
        return self.effects.empty((several,) if several else pieces[0].shape, pieces[0].spec.dtype)

    def receive(self, message: T, pieces: Sequence[Piece], room: int = 0) -> None:
        if len(pieces) == 1 and not room:
            self.hold(pieces, [message])
        else:
            self.hold(pieces, self.effects.unpack(message, pieces))
            self.effects.free(message)

    def hold(self, pieces: Sequence[Piece], tensors: Sequence[T]) -> None:
        self.held.update(zip((piece.path for piece in pieces), tensors, strict=True))

    def drop(self, path: str) -> None:
        self.effects.free(self.held.pop(path))

    def attempt(self, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Return the action's result; after an error do nothing, and keep the first one for the closing agreement."""
        if self.error is not None:
            return None
        try:
            return action(*args, **kwargs)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever fails here, others wait for the messages to come
            self.error = error
            self.held.clear()
            return None


def _travels_as_view(pieces: Sequence[Piece], room: int) -> bool:
    return len(pieces) == 1 and not room and pieces[0].is_run


def message_bytes(exchange: Exchange) -> int:
    """Return the bytes of the message that each member of an exchange gets."""
    num_elements = exchange.room or sum(piece.num_elements for piece in exchange.pieces)
    return num_elements * num_bytes(exchange.dtype)
