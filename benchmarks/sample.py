"""One sample: fresh processes that wait for each other, run one way, and tell what it took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import frozen
from memory import peak, settle, touch
from processes import run_ranks
from traffic import Traffic
from ways import WAYS, local_part, plan_for

if TYPE_CHECKING:
    from models import Case
    from numpy.typing import NDArray
    from ways import Shards

    from shardplan.specs import Plan

SEED = 0

Parts = Mapping[str, tuple["NDArray[Any]", int | None]]
"""Local shards by path, with the axes along which ranks are put together; None for what is whole on every rank."""


@frozen(eq=False)
class Job:
    """What the ranks do, made before they start.

    Args:
        way: Name of the way.
        case: The model.
        plan: The plan, if the way has one.
    """

    way: str
    case: Case
    plan: Plan | None

    def run(self) -> Shards:
        """Go the way, with the same state of torch's generator on every rank."""
        torch.manual_seed(SEED)
        return WAYS[self.way].run(self.case, self.plan)


@frozen(eq=False)
class Outcome:
    """What one rank saw.

    Args:
        seconds: From the barrier to the last value.
        peak_bytes: Most anonymous memory, above that at the start.
        held_bytes: Storages of its local shards.
        num_collectives: Collectives that it took part in; 0 if they were not counted.
        sent_bytes: Bytes that these moved from one rank to another, all ranks together.
    """

    seconds: float
    peak_bytes: int
    held_bytes: int
    num_collectives: int = 0
    sent_bytes: int = 0


def take(job: Job, warm_up: Job, num_ranks: int, *, count: bool = False) -> list[Outcome]:
    """Return what each of ``num_ranks`` fresh processes saw of a job; none is left behind.

    Args:
        job: What is measured.
        warm_up: The same for a tiny model, before the clock: loads code lazily, and connects the ranks.
        num_ranks: Number of processes.
        count: Whether collectives are counted, which takes time.
    """
    touch(num_ranks * job.case.num_bytes)
    return run_ranks(num_ranks, _measure, job, warm_up, count)


def look(job: Job, num_ranks: int) -> list[Parts]:
    """Return what each of ``num_ranks`` fresh processes gets by a job."""
    return run_ranks(num_ranks, _values, job)


def first_use(case: Case, way: str) -> float:
    """Return the seconds of planning and executing on one rank in this process, with all that is loaded or compiled.

    Processes that are started later inherit it.
    """
    start = time.perf_counter()
    Job(way, case, plan_for(case, 1, way)).run()
    return time.perf_counter() - start


def _measure(job: Job, warm_up: Job, count: bool) -> Outcome:  # noqa: FBT001
    warm_up.run()
    traffic = Traffic()
    before = settle()
    dist.barrier()
    start = time.perf_counter()
    with traffic if count else nullcontext():
        shards = job.run()
    seconds = time.perf_counter() - start
    taken = peak() - before
    parts = [local_part(job.case, path, tensor)[0] for path, tensor in shards.items()]
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return Outcome(seconds, taken, sum(held.values()), traffic.num_collectives, traffic.sent_bytes)


def _values(job: Job) -> Parts:
    local = {path: local_part(job.case, path, tensor) for path, tensor in job.run().items()}
    return {path: (part.numpy(), axis) for path, (part, axis) in local.items()}
