"""Run a judge over many mutants in forked processes, each mutant with a time limit."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from multiprocessing.connection import wait

from attrs import define

LIMIT_S = 180
"""Seconds for a mutant; a process that takes longer is ended, and its mutant is not judged."""

RENEWED_AFTER = 150
"""Mutants after which a process is replaced, so that whatever they leave behind does not add up."""


@define(eq=False)
class _Worker:
    """A forked process, and the item that it is at.

    Args:
        process: The process.
        pipe: The end of its pipe that the parent has.
        item: Number of the item that it is at, None if it waits.
        since: When it began with it.
        num_done: How many it has finished.
    """

    process: object
    pipe: object
    item: int | None = None
    since: float = 0.0
    num_done: int = 0


def run_all(function, items, num_jobs, on_late, on_done=lambda result: None):
    """Return ``function(item)`` for all items, in order.

    Args:
        function: Called in a forked process; its result can be pickled.
        items: Its arguments; they are not pickled.
        num_jobs: Number of processes.
        on_late: ``(item, cause) -> result`` for an item that has taken too long, or whose process has died.
        on_done: Called with each result as it comes.
    """
    items = list(items)
    results, todo, workers = {}, list(range(len(items)))[::-1], [_start(function, items) for _ in range(num_jobs)]
    while len(results) < len(items):
        for at, worker in enumerate(workers):
            if worker.item is None and todo:
                if worker.num_done >= RENEWED_AFTER:
                    _end(worker)
                    worker = workers[at] = _start(function, items)  # noqa: PLW2901
                worker.item, worker.since = todo.pop(), time.monotonic()
                worker.pipe.send(worker.item)
        wait([worker.pipe for worker in workers if worker.item is not None], timeout=1.0)
        for at, worker in enumerate(workers):
            if worker.item is None:
                continue
            result = _result(worker, items, on_late)
            if result is not None:
                results[worker.item] = result
                on_done(result)
                is_spent = not worker.process.is_alive()
                worker.item, worker.num_done = None, worker.num_done + 1
                if is_spent:
                    workers[at] = _start(function, items)
    for worker in workers:
        _end(worker)
    return [results[number] for number in range(len(items))]


def _start(function, items):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(function, items, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(function, items, pipe):
    warnings.simplefilter("ignore")
    while True:
        pipe.send(function(items[pipe.recv()]))


def _result(worker, items, on_late):
    """Return the result of a worker's item, None if it is still at it."""
    try:
        if worker.pipe.poll():
            return worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return on_late(items[worker.item], f"its process ended with {worker.process.exitcode}")
    if time.monotonic() - worker.since > LIMIT_S:
        worker.process.kill()
        worker.process.join()
        return on_late(items[worker.item], f"it took more than {LIMIT_S} s")
    return None


def _end(worker):
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()
