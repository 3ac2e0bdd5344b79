"""Find where a difference begins: the first module whose output differs though its inputs agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from ...specs.comparison import Difference, percent
from ...specs.layout_steps import DispatchTokens
from ...specs.mesh import Coordinate
from ...specs.plan import Plan
from .layouts import KnownSplit, disagreement, groups_of_model, known_splits
from .observe import Seen
from .ranks import RankRun
from .whole import WholeRuns


def first_module(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], tolerance: float) -> tuple[Difference | None, int]:
    """Return the first module whose output differs though its inputs agree, and how many modules could be compared."""
    splits = known_splits(plan.tree)
    # experts get the tokens of all ranks along 'expert'
    gathered = {step.module for step in plan.steps if isinstance(step, DispatchTokens)}
    compared: set[str] = set()
    best: Difference | None = None
    for group in groups_of_model(plan.mesh):
        seen = [_by_call(ranks[here.rank].run.seen) for here in group]
        errors: dict[tuple[str, int], float] = {}
        inner = ""
        for call in whole.runs[group[0].index("data")].seen:
            held = [one.get((call.path, call.call, call.side)) for one in seen]
            error = _disagreement(call, held, group, splits)
            if error is None or (call.side == "input" and call.path in gathered):
                continue
            if call.side == "input":
                errors[call.path, call.call] = error
                if error > tolerance and not inner:
                    inner = f"inside it, the input of {call.path!r} is the first to differ"
                continue
            compared.add(call.path)
            if error > tolerance and errors.get((call.path, call.call), 0.0) <= tolerance:
                has_inputs = (call.path, call.call) in errors
                how = f"differs by {percent(error)}" if isfinite(error) else "is larger than that of the whole model"
                cause = f"its output {how}{'; its inputs agree' if has_inputs else ''}"
                inside = inner and (not call.path or f"'{call.path}." in inner)
                difference = Difference("output", call.path, f"{cause}; {inner}" if inside else cause, error)
                best = best or difference
                break
    return best, len(compared)


def _by_call(seen: Iterable[Seen]) -> dict[tuple[str, int, str], Seen]:
    return {(one.path, one.call, one.side): one for one in seen}


def _disagreement(
    call: Seen, held: Sequence[Seen | None], group: Sequence[Coordinate], splits: Sequence[KnownSplit]
) -> float | None:
    """Return the largest disagreement of the tensors of a call; None if none can be compared."""
    found: list[float] = []
    for place, tensor in enumerate(call.tensors):
        mine = [one.tensors[place] for one in held if one is not None and place < len(one.tensors)]
        if len(mine) == len(held):
            error = disagreement(tensor, mine, group, splits)
            found += [] if error is None else [error]
    return max(found, default=None)
