"""Effects without a world: they only keep the books, with a number of bytes for each tensor."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from attrs import Factory, define

from ...specs.dtypes import num_bytes
from ...specs.receipt import Receipt
from ..checkpoints.byte_ranges import staging_bytes, stored_parts, take_all
from ..checkpoints.expected_checksums import known_sums
from ..checkpoints.formats.rank_file import rank_file_name
from .interpret import interpret, message_bytes
from .ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.steps import LayoutStep
    from ...specs.stored import Folder
    from .resolve import Alias, Distribute, Exchange, KeepStages, Make, OpenGroups, OpenTieGroups, Piece, SumGradients

AGREEMENT_BYTES = 8 * 16
"""Bytes that each rank tells the others in one agreement: 16 integers of 8 bytes."""


def predict(plan: Plan, rank: int) -> Receipt:
    """Return the receipt that a rank will give, by running the interpreter with effects that only keep the books.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> from shardplan.specs.steps import Allocate, Place
    >>> tree = SpecTree([ParamSpec("weight", (4, 4), "float32")])
    >>> predict(Plan(Mesh(data=64), tree, [Allocate(0, ("weight",)), Place(0, ("weight",))]), rank=17).held_bytes
    64
    """
    effects = DryRun(rank)
    interpret(plan, plan.mesh.coordinate(rank), effects)
    return effects.ledger.receipt(rank)


@define
class DryRun:
    """Predicts the receipt of one rank; a tensor is its number of bytes.

    ``execute(plan, effects=DryRun(rank=1234))`` runs the interpreter itself, without tensors or processes.

    Args:
        rank: The rank that it stands for.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> from shardplan.specs.steps import Allocate, Place
    >>> from shardplan.functional import DryRun, execute
    >>> tree = SpecTree([ParamSpec("weight", (4, 4), "float32")])
    >>> plan = Plan(Mesh(data=4096), tree, [Allocate(0, ("weight",)), Place(0, ("weight",))])
    >>> execute(plan, effects=DryRun(rank=1234)).receipt.held_bytes
    64
    """

    rank: int
    ledger: Ledger = Factory(Ledger)

    def agree(self, plan: Plan, error: BaseException | None) -> None:
        if error is not None:
            raise error
        if plan.mesh.num_ranks > 1:
            self.ledger.call("all_gather", (), range(plan.mesh.num_ranks), AGREEMENT_BYTES)

    def open_groups(self, work: OpenGroups) -> None:
        self.ledger.num_groups += work.num_groups

    def open_tie_groups(self, work: OpenTieGroups) -> None:
        self.ledger.num_groups += sum(map(len, work.groups))

    def make(self, work: Make, seed: int) -> Sequence[int]:
        made = [self._allocate(piece.num_bytes) for piece in work.pieces]
        for scratch in [self._allocate(piece.num_bytes) for piece in work.scratch]:
            self.free(scratch)
        return made

    def evaluate(self, pieces: Sequence[Piece], seed: int) -> Sequence[int]:
        return [self._allocate(piece.num_bytes) for piece in pieces]

    def take(self, piece: Piece) -> int:
        return self._allocate(piece.num_bytes)

    def load(self, pieces: Sequence[Piece], folder: Folder) -> Sequence[int]:
        made = [self._allocate(piece.num_bytes) for piece in pieces]
        found = [taken for piece in pieces for taken in take_all(stored_parts(piece.spec), piece.index)]
        self.free(self._allocate(staging_bytes(sum(taken.num_bytes for taken in found))))
        for taken in found:
            self.ledger.read(taken.stored.file, taken.num_bytes)
        return made

    def load_own(self, pieces: Sequence[Piece], folder: Folder) -> Sequence[int]:
        made = [self._allocate(piece.num_bytes) for piece in pieces]
        self.free(self._allocate(staging_bytes(sum(made))))
        self.ledger.read(rank_file_name(self.rank), sum(made))
        return made

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        if plan.mesh.num_ranks > 1:
            self.ledger.call("all_reduce", (), range(plan.mesh.num_ranks), 8 * (len(known_sums(plan.tree)) + 1))

    def empty(self, shape: tuple[int, ...], dtype: str) -> int:
        return self._allocate(prod(shape) * num_bytes(dtype))

    def cut(self, whole: int, piece: Piece) -> int:
        return self._allocate(piece.num_bytes)

    def view(self, whole: int, piece: Piece) -> int:
        return piece.num_bytes

    def pack(self, tensors: Sequence[tuple[int, Piece | None]], room: int, dtype: str) -> int:
        return self._allocate(room * num_bytes(dtype))

    def unpack(self, message: int, pieces: Sequence[Piece]) -> list[int]:
        return [self._allocate(piece.num_bytes) for piece in pieces]

    def broadcast(self, message: int, exchange: Exchange) -> None:
        self.ledger.call("broadcast", exchange.mesh_axes, exchange.group, message_bytes(exchange))

    def scatter(self, message: int, parts: Sequence[int], exchange: Exchange) -> None:
        self.ledger.call("scatter", exchange.mesh_axes, exchange.group, message_bytes(exchange))

    def free(self, tensor: int) -> None:
        self.ledger.free(tensor)

    def install(self, spec: ParamSpec, tensor: int) -> None:
        self.ledger.place(tensor)

    def alias(self, work: Alias) -> None:
        pass

    def change(self, step: LayoutStep) -> None:
        pass

    def keep_stages(self, plan: Plan, work: KeepStages) -> None:
        pass

    def sum_gradients(self, work: SumGradients) -> None:
        pass

    def distribute(self, work: Distribute) -> None:
        pass

    def make_optimizer(self) -> None:
        pass

    def hand(self, plan: Plan) -> None:
        pass

    def _allocate(self, num_bytes: int) -> int:
        self.ledger.allocate(num_bytes)
        return num_bytes
