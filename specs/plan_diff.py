"""The difference of two plans: asked by a program, printed for a pull request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from attrs import fields, frozen

from .dtypes import human_bytes
from .finding import Finding
from .fold_layers import fold
from .memory import Memory
from .mesh import Coordinate
from .text_table import ranges, table

_MEMORY = (*(f.name for f in fields(Memory)), "training_bytes", "peak_bytes")


@frozen
class Change:
    """A changed property.

    Args:
        path: Field of the plan, tensor or module.
        what: The changed property of a tensor or module: ``type``, ``stage``, ``source`` ...; ``""`` for all properties.
        before: The old value in words; None if the tensor or module is new.
        after: The new value in words; None if the tensor or module is gone.
    """

    path: str
    what: str
    before: str | None
    after: str | None


@frozen
class RankChange:
    """Ranks whose memory differs between two plans on the same mesh; they are alike before, and alike after.

    Args:
        coordinate: The first of these ranks.
        num_ranks: Number of these ranks.
        before: Memory of each rank, before.
        after: Memory of each rank, after.
    """

    coordinate: Coordinate
    num_ranks: int
    before: Memory
    after: Memory


@frozen
class Spread:
    """Total memory of the ranks.

    Args:
        worst: Bytes of the rank that has the most.
        least: Bytes of the rank that has the least.
        total: Bytes of all ranks.
    """

    worst: int
    least: int
    total: int


@frozen
class SpreadChange:
    """Total memory of the ranks, before and after.

    Args:
        what: A property of ``Memory``: ``held_bytes``, ``training_bytes``, ``peak_bytes``.
        before: Of the ranks that there were.
        after: Of the ranks that there are.
    """

    what: str
    before: Spread
    after: Spread


@frozen
class Messages:
    """Messages of a kind.

    Args:
        num_calls: Number of messages.
        num_bytes: During execution: bytes that each member of a group receives. In a training step: bytes that a rank sends.
    """

    num_calls: int = 0
    num_bytes: int = 0


@frozen
class TrafficChange:
    """Changed messages, on the ranks of a stage that send the most.

    Args:
        during: While the plan is executed, or in each training step.
        stage: Place along ``pipe``.
        kind: Mesh axes, cargo and operator.
        before: The messages before.
        after: The messages after.
    """

    during: Literal["execution", "step"]
    stage: int
    kind: tuple[str, ...]
    before: Messages
    after: Messages


@frozen
class Move:
    """Bytes of some tensors that ranks receive to go from a plan to another.

    Args:
        paths: The tensors, repeated layers folded.
        num_tensors: How many.
        before: Their type, in the printed form.
        after: Their type now.
        total_bytes: Bytes that all ranks receive.
        worst_bytes: Bytes that the rank receives which receives most of them.
    """

    paths: tuple[str, ...]
    num_tensors: int
    before: str
    after: str
    total_bytes: int
    worst_bytes: int


@frozen
class PlanDiff:
    """The difference of two plans.

    Args:
        before: Fingerprint of the plan before.
        after: Fingerprint of the other.
        fields: Changes of the plan as a whole: mesh, target, config, seed, stages, kinds of steps.
        tensors: Tensors that are new, gone or declared differently, a change a row.
        modules: Modules that compute differently.
        ranks: Changes of memory by rank; empty if the meshes differ.
        spreads: Changes of total memory.
        traffic: Messages that are new, gone or changed.
        came: Findings of the plan after alone.
        went: Findings of the plan before alone.
        moves: Bytes to receive to go from the plan before to the plan after, by family of tensors.
        worst_rank: The rank that receives most; None if nothing is received.
        worst_bytes: Bytes that it receives.
    """

    before: str
    after: str
    fields: tuple[Change, ...] = ()
    tensors: tuple[Change, ...] = ()
    modules: tuple[Change, ...] = ()
    ranks: tuple[RankChange, ...] = ()
    spreads: tuple[SpreadChange, ...] = ()
    traffic: tuple[TrafficChange, ...] = ()
    came: tuple[Finding, ...] = ()
    went: tuple[Finding, ...] = ()
    moves: tuple[Move, ...] = ()
    worst_rank: int | None = None
    worst_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether the plans are equal."""
        return self.before == self.after

    @property
    def added(self) -> tuple[str, ...]:
        """Paths of the tensors that came."""
        return tuple(change.path for change in self.tensors if change.before is None)

    @property
    def removed(self) -> tuple[str, ...]:
        """Paths of the tensors that went."""
        return tuple(change.path for change in self.tensors if change.after is None)

    @property
    def moved_bytes(self) -> int:
        """Bytes that all ranks receive."""
        return sum(move.total_bytes for move in self.moves)

    def __str__(self) -> str:
        if self.is_empty:
            return f"no change: both are plan {self.before[:12]}"
        sections = [
            _head("plan", table((c.path, f"{_said(c.before)} -> {_said(c.after)}") for c in self.fields)),
            _head("tensors", _folded(self.tensors)),
            _head("modules", _folded(self.modules)),
            _head("holds", [*table(self._spread()), *table(self._by_rank())]),
            _head("sends", table(self._messages("execution", ("over", "op"), "bytes to each rank"))),
            _head("step", table(self._messages("step", ("over", "what", "op"), "bytes on the wire"))),
            _head("finds", [*(f"- {f}" for f in self.went), *(f"+ {f}" for f in self.came)]),
            _head("moves", [*self._moved()]),
        ]
        lines = [f"plan {self.before[:12]} -> plan {self.after[:12]}"]
        for section in sections:
            lines += ["", *section] if section else []
        return "\n".join(lines)

    def _spread(self) -> Iterator[tuple[str, ...]]:
        if self.spreads:
            yield "bytes", "of the worst rank", "of the least", "of all ranks"
        for spread in self.spreads:
            pairs = ((getattr(spread.before, name), getattr(spread.after, name)) for name in ("worst", "least", "total"))
            yield _name(spread.what), *(_pair(*pair) for pair in pairs)

    def _by_rank(self) -> Iterator[tuple[str, ...]]:
        differs = [n for n in _MEMORY if any(getattr(row.before, n) != getattr(row.after, n) for row in self.ranks)]
        if self.ranks:
            yield "stage", "ranks", "first", *map(_name, differs)
        rows: dict[tuple[int, tuple[str, ...]], list[RankChange]] = {}
        for row in self.ranks:
            cells = tuple(_pair(getattr(row.before, name), getattr(row.after, name)) for name in differs)
            rows.setdefault((row.num_ranks, cells), []).append(row)
        for (num_ranks, cells), alike in rows.items():
            stages = dict.fromkeys(row.coordinate.pipe for row in alike)
            yield ranges(stages), str(num_ranks * len(alike)), str(alike[0].coordinate.rank), *cells

    def _messages(self, during: str, columns: tuple[str, ...], what: str) -> Iterator[tuple[str, ...]]:
        rows: dict[tuple[str, ...], list[int]] = {}
        for row in self.traffic:
            if row.during == during:
                calls = _pair(row.before.num_calls, row.after.num_calls, str)
                sizes = _pair(row.before.num_bytes, row.after.num_bytes)
                rows.setdefault((*row.kind, calls, sizes), []).append(row.stage)
        if rows:
            yield "stage", *columns, "messages", what
        for cells, stages in rows.items():
            yield ranges(stages), *cells

    def _moved(self) -> Iterator[str]:
        if self.moves:
            rows = (
                (", ".join(m.paths), _types(m), human_bytes(m.total_bytes), human_bytes(m.worst_bytes)) for m in self.moves
            )
            yield from table([("what ranks must receive", "", "in all", "the worst rank"), *rows], right=True)
            most = f"rank {self.worst_rank} receives most, {human_bytes(self.worst_bytes)}"
            yield f"{human_bytes(self.moved_bytes)} in all; {most}"


def _types(move: Move) -> str:
    return move.after if move.before == move.after else f"{move.before} -> {move.after}"


def _folded(changes: Iterable[Change]) -> list[str]:
    """Write changes, folded over repeated layers; ``+`` came, ``-`` went, ``~`` changed."""
    rows: list[tuple[str, tuple[str, ...]]] = []
    for change in changes:
        if change.before is None or change.after is None:
            rows.append((change.path, ("+" if change.before is None else "-", _said(change.after or change.before))))
        else:
            named = f"{change.what}: " if change.what not in ("", "type") else ""
            rows.append((change.path, ("~", f"{named}{_said(change.before)} -> {_said(change.after)}")))
    return table((cells[0], path or "(model)", cells[1]) for path, cells in fold(rows))


def _head(name: str, lines: list[str]) -> list[str]:
    return [f"{name if not number else '':<8}{line}" for number, line in enumerate(lines)]


def _said(text: str | None) -> str:
    return text or "nothing"


def _name(attribute: str) -> str:
    return attribute.removesuffix("_bytes") + ("~" if attribute in ("activation_bytes", "checkpointed_bytes") else "")


def _pair(before: int | None, after: int | None, write: Callable[[int], str] = human_bytes) -> str:
    one, other = ("unknown" if value is None else write(value) for value in (before, after))
    if before == after:
        return one
    if before is None or after is None:
        return f"{one} -> {other}"
    return f"{one} -> {other} ({'+' if after > before else '-'}{write(abs(after - before))})"
