"""Which micro-batches a pipeline has on their way, moment by moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .microbatches import num_microbatches

if TYPE_CHECKING:
    from ....specs.plan import Plan


def in_flight(plan: Plan, stage: int) -> int:
    """Return the micro-batches of which a stage keeps activations at one time; 1 without a pipeline.

    >>> from shardplan.specs import Mesh, Pipeline, Plan, SpecTree, Stage
    >>> pipeline = Pipeline(tuple(Stage((), (), (), "") for _ in range(4)))
    >>> config = {"num_microbatches": 8}
    >>> plan = Plan(Mesh(pipe=4), SpecTree(), (), target="torch", config=config, pipeline=pipeline)
    >>> [in_flight(plan, stage) for stage in range(4)]
    [4, 3, 2, 1]
    """
    return max(kept[stage] for kept in moments(plan, stage % plan.mesh.pipe)) if plan.pipeline else 1


def moments(plan: Plan, place: int) -> Iterator[Counter[int]]:
    """Iterate over how many micro-batches each stage of a place along ``pipe`` keeps, where it keeps the most.

    With one forward one backward a stage has as many as there are stages from it to the last, if there are so many
    (``num_pipe_buffers`` in runtime/pipe/schedule.py of DeepSpeed 0.19.8; ``Schedule1F1B`` in
    torch/distributed/pipelining/schedules.py of torch 2.13); GPipe goes forward with all of them first.
    """
    num, num_stages, pipe = num_microbatches(plan), len(plan.stages), plan.mesh.pipe
    match (plan.config or {}).get("schedule") if plan.target == "torch" else None:
        case "gpipe":
            yield Counter({place: num})
        case "interleaved_1f1b":
            yield from _interleaved(num_stages // pipe, pipe, num, place)
        case _:
            yield Counter({place: min(num, num_stages - place)})


def _interleaved(num_local: int, pipe: int, num: int, place: int) -> Iterator[Counter[int]]:
    """A place goes forward with a round of micro-batches of one of its stages, then of its next one; backward likewise.

    After the warm-up each forward is followed by a backward (``ScheduleInterleaved1F1B`` in
    torch/distributed/pipelining/schedules.py of torch 2.13, after Narayanan et al. 2021, section 2.2).
    """
    a_round = num // max(1, num // pipe)
    warm_up = min((num_local - 1) * a_round + 2 * (pipe - 1 - place), num * num_local)
    kept: Counter[int] = Counter()
    for step in range(num * num_local):
        kept[step // a_round % num_local * pipe + place] += 1
        yield kept.copy()
        if step >= warm_up:
            back = (step - warm_up) // a_round % num_local
            kept[(num_local - 1 - back) * pipe + place] -= 1
