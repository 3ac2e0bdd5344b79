"""Effects without tensors or processes: a tensor is its number of bytes, and only the ledger is kept."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from attrs import Factory, define

from ...specs.dtypes import num_bytes
from ...specs.receipt import AGREEMENT_BYTES, Receipt
from ..checkpoints.byte_ranges import select_all, staging_bytes, stored_parts
from ..checkpoints.expected_checksums import expected_sums
from ..checkpoints.formats.rank_file import rank_file_name
from .interpret import interpret
from .ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...specs.layout_steps import LayoutStep
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.stored import Folder
    from . import work


def predict(plan: Plan, rank: int) -> Receipt:
    """Return the receipt that a rank will give, by interpreting the plan without tensors or processes.

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
    """Predicts the receipt of one rank: ``execute(plan, effects=DryRun(rank=1234))``.

    Args:
        rank: The rank.
        ledger: Its allocations and messages.

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

    def make_groups(self, task: work.MakeGroups) -> None:
        self.ledger.num_groups += task.num_groups

    def make_tie_groups(self, task: work.MakeTieGroups) -> None:
        self.ledger.num_groups += sum(map(len, task.groups))

    def generate(self, task: work.Generate, seed: int) -> Sequence[int]:
        made = self._allocate_all(task.pieces)
        for scratch in self._allocate_all(task.scratch):
            self.free(scratch)
        return made

    def evaluate(self, pieces: Sequence[work.Piece], seed: int) -> Sequence[int]:
        return self._allocate_all(pieces)

    def take(self, piece: work.Piece) -> int:
        return self._allocate(piece.num_bytes)

    def load_shard(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[int]:
        made = self._allocate_all(pieces)
        reads = [selection for piece in pieces for selection in select_all(stored_parts(piece.spec), piece.index)]
        self.free(self._allocate(staging_bytes(sum(selection.num_bytes for selection in reads))))
        for selection in reads:
            self.ledger.read(selection.stored.file, selection.num_bytes)
        return made

    def load_own(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[int]:
        made = self._allocate_all(pieces)
        self.free(self._allocate(staging_bytes(sum(made))))
        self.ledger.read(rank_file_name(self.rank), sum(made))
        return made

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        if plan.mesh.num_ranks > 1:
            self.ledger.call("all_reduce", (), range(plan.mesh.num_ranks), 8 * (len(expected_sums(plan.tree)) + 1))

    def allocate(self, shape: tuple[int, ...], dtype: str) -> int:
        return self._allocate(prod(shape) * num_bytes(dtype))

    def slice(self, whole: int, piece: work.Piece) -> int:
        return self._allocate(piece.num_bytes)

    def view(self, whole: int, piece: work.Piece) -> int:
        return piece.num_bytes

    def pack(self, tensors: Sequence[tuple[int, work.Piece | None]], num_elements: int, dtype: str) -> int:
        return self._allocate(num_elements * num_bytes(dtype))

    def unpack(self, buffer: int, pieces: Sequence[work.Piece]) -> list[int]:
        return self._allocate_all(pieces)

    def broadcast(self, buffer: int, message: work.Message) -> None:
        self.ledger.call("broadcast", message.mesh_axes, message.group, message.num_bytes)

    def scatter(self, buffer: int, parts: Sequence[int], message: work.Message) -> None:
        self.ledger.call("scatter", message.mesh_axes, message.group, message.num_bytes)

    def free(self, tensor: int) -> None:
        self.ledger.free(tensor)

    def place(self, spec: ParamSpec, tensor: int) -> None:
        self.ledger.place(tensor)

    def tie(self, task: work.Tie) -> None:
        pass

    def change_layout(self, step: LayoutStep) -> None:
        pass

    def take_stages(self, plan: Plan, task: work.TakeStages) -> None:
        pass

    def sum_tied(self, task: work.SumTied) -> None:
        pass

    def as_dtensors(self, task: work.AsDTensors) -> None:
        pass

    def make_optimizer(self) -> None:
        pass

    def wrap(self, plan: Plan) -> None:
        pass

    def _allocate_all(self, pieces: Sequence[work.Piece]) -> list[int]:
        return [self._allocate(piece.num_bytes) for piece in pieces]

    def _allocate(self, num_bytes: int) -> int:
        self.ledger.allocate(num_bytes)
        return num_bytes
