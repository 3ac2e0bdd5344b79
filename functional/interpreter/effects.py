"""The effects of the interpreter: a method for each kind of work, and the operations that messages are made of.

``TorchEffects`` fills a module with real tensors; ``DryRun`` only counts bytes; tests have recorders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...specs.layout_steps import LayoutStep
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.stored import Folder
    from . import work
    from .ledger import Ledger

T = TypeVar("T")


class Effects(Protocol[T]):
    """The effects of one rank; ``T`` is a tensor or its stand-in, such as a number of bytes."""

    ledger: Ledger

    @property
    def rank(self) -> int:
        """The rank that the effects are for."""
        ...

    def agree(self, plan: Plan, error: BaseException | None) -> None:
        """Tell all ranks whether this rank can go on; raise the first error of any rank on every rank."""
        ...

    def make_groups(self, task: work.MakeGroups) -> None:
        """Make process groups along mesh axes."""
        ...

    def make_tie_groups(self, task: work.MakeTieGroups) -> None:
        """Make process groups that join stages."""
        ...

    def generate(self, task: work.Generate, seed: int) -> Sequence[T]:
        """Run init code on whole tensors; return the tensors of ``task.pieces``."""
        ...

    def evaluate(self, pieces: Sequence[work.Piece], seed: int) -> Sequence[T]:
        """Allocate pieces and evaluate their init programs."""
        ...

    def take(self, piece: work.Piece) -> T:
        """Return a copy of a piece of the user's module."""
        ...

    def load_shard(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[T]:
        """Allocate pieces and read them from a folder; each file is read in the order in which its bytes lie."""
        ...

    def load_own(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[T]:
        """Allocate pieces and read them from the rank's own file."""
        ...

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        """Add up the position sums of all ranks and compare them; if any rank has ``failed``, only take part."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> T:
        """Allocate an uninitialised tensor."""
        ...

    def slice(self, whole: T, piece: work.Piece) -> T:
        """Return a copy of a part of a whole tensor."""
        ...

    def view(self, whole: T, piece: work.Piece) -> T:
        """Return a contiguous part of a whole tensor, without a copy."""
        ...

    def pack(self, tensors: Sequence[tuple[T, work.Piece | None]], num_elements: int, dtype: str) -> T:
        """Copy tensors, or the given pieces of them, into one flat buffer of ``num_elements``."""
        ...

    def unpack(self, buffer: T, pieces: Sequence[work.Piece]) -> list[T]:
        """Copy the pieces out of a flat buffer."""
        ...

    def broadcast(self, buffer: T, message: work.Message) -> None:
        """Send the first rank's buffer to all of the group."""
        ...

    def scatter(self, buffer: T, parts: Sequence[T], message: work.Message) -> None:
        """Send from the first rank of the group to each member its part, which arrives in the member's buffer."""
        ...

    def free(self, tensor: T) -> None:
        """Note that nothing refers to a tensor any more."""
        ...

    def place(self, spec: ParamSpec, tensor: T) -> None:
        """Make a tensor the module's own."""
        ...

    def tie(self, task: work.Tie) -> None:
        """Put the tensor that is placed at the canonical path at the other paths too."""
        ...

    def change_layout(self, step: LayoutStep) -> None:
        """Change how a module computes."""
        ...

    def take_stages(self, plan: Plan, task: work.TakeStages) -> None:
        """Make the stages that this rank runs out of the module."""
        ...

    def sum_tied(self, task: work.SumTied) -> None:
        """Note a tied parameter whose gradients are summed over stages."""
        ...

    def as_dtensors(self, task: work.AsDTensors) -> None:
        """Make the module's tensors DTensors."""
        ...

    def make_optimizer(self) -> None:
        """Make the user's optimizer."""
        ...

    def wrap(self, plan: Plan) -> None:
        """Hand the module to the plan's target."""
        ...
