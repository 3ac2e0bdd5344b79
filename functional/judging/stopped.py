"""Ranks that stop: an error, a collective that other ranks do not issue, a wait that never ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from ...specs.comparison import Difference
from .groups import Call
from .ranks import EXCHANGE, RankRun
from .threads import MismatchError


def stopped(ranks: Sequence[RankRun]) -> Iterator[Difference]:
    """Iterate over ranks that did not come to their end, or issued different collectives; errors explain all the rest."""
    errors = list(_errors(ranks))
    yield from errors or (*_different_collectives(ranks), *_waiting(ranks))


def _errors(ranks: Sequence[RankRun]) -> Iterator[Difference]:
    for rank, run in enumerate(ranks):
        error = run.ended.error
        if error is not None and not isinstance(error, MismatchError):
            text = str(error).strip().partition("\n")[0]
            yield Difference("error", run.where, f"rank {rank} raises {type(error).__name__}: {text}", None, (rank,))


def _different_collectives(ranks: Sequence[RankRun]) -> Iterator[Difference]:
    """Iterate over collectives that ranks of a group do not issue alike: the first of each group."""
    of_group: dict[tuple[int, ...], dict[int, list[Call]]] = {}
    for rank, run in enumerate(ranks):
        for call in run.run.issued:
            members = of_group.setdefault(call.ranks, {member: [] for member in call.ranks})
            members[rank].append(call)
    for members, issued in of_group.items():
        for together in zip_longest(*issued.values()):
            if len(set(together)) == 1:
                continue
            told = [f"rank {rank} issues {_named(call)}" for rank, call in zip(members, together, strict=True)]
            first = next(call for call in together if call is not None)
            yield Difference("collective", first.module, "; ".join(told), None, members)
            break


def _named(call: Call | None) -> str:
    return f"{call.name} in {call.module or 'the model or its backward pass'}" if call else "none"


def _waiting(ranks: Sequence[RankRun]) -> Iterator[Difference]:
    for rank, run in enumerate(ranks):
        if run.ended.is_late:
            yield Difference("hang", run.where, f"rank {rank} was still running when the time was up", None, (rank,))
    if any(isinstance(run.ended.error, MismatchError) for run in ranks):
        return  # the ranks that wait, wait for these
    waiting = {rank: run for rank, run in enumerate(ranks) if run.ended.waiting}
    if any(run.ended.waiting != EXCHANGE for run in waiting.values()):
        waiting = {rank: run for rank, run in waiting.items() if run.ended.waiting != EXCHANGE}
    for rank, run in waiting.items():
        yield Difference("hang", run.where, f"rank {rank} waits for ever in {run.ended.waiting}", None, (rank,))
