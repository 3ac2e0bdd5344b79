"""Ranks as threads of one process: one runs at a time, and hands over where it waits for others.

A rank runs until it waits in a meeting of ranks that have not all come; then the next rank runs. So the order of execution
is the same in every run, each rank has random generators of its own, and ranks that wait for each other in vain are noticed
at once, without a time limit.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from attrs import Factory, define, field, frozen

T = TypeVar("T")

_GRACE = 2.0
"""Seconds for the user's code to end, where the time is up or the user interrupts."""


class Abandoned(BaseException):
    """Ends a rank that waits for a rank that never comes; no handler of the user's code takes it for an error."""


class MismatchError(RuntimeError):
    """Ranks meet in different collectives."""


@frozen
class Ended(Generic[T]):
    """What became of a rank.

    Args:
        result: The result of its job; None if it did not come to its end.
        error: What its job raised, if anything.
        waiting: What it waited for in vain, in words; empty if nothing.
        is_late: Whether it still ran when the time was up.
    """

    result: T | None = None
    error: Exception | None = None
    waiting: str = ""
    is_late: bool = False


@define(eq=False)
class _Rank:
    """A rank: its turn, and the state of the random generators while it has none."""

    turn: threading.Semaphore = Factory(lambda: threading.Semaphore(0))
    is_done: bool = False
    waiting: str = ""
    generators: Any = None
    ended: Ended[Any] = field(factory=Ended)

    def given_up(self) -> Ended[Any]:
        """Return what became of it when the time is up."""
        return Ended(waiting=self.waiting, is_late=not self.waiting)


@define(eq=False)
class _Meeting:
    """Ranks that have come to a meeting, with what each brings."""

    signature: str
    brought: dict[int, Any] = Factory(dict)


@define(eq=False)
class RankThreads:
    """Runs a job for each of several ranks.

    Args:
        num_ranks: Number of ranks.
        limit: Seconds after which the ranks are given up.
    """

    num_ranks: int
    limit: float = 600.0
    _ranks: list[_Rank] = Factory(lambda self: [_Rank() for _ in range(self.num_ranks)], takes_self=True)
    _ready: deque[int] = Factory(deque)
    _meetings: dict[Hashable, _Meeting] = Factory(dict)
    _boxes: dict[Hashable, deque[Any]] = Factory(dict)
    _is_over: bool = False
    _finished: threading.Event = Factory(threading.Event)
    _here: threading.local = Factory(threading.local)

    def run(self, job: Callable[[int], T]) -> list[Ended[T]]:
        """Return what became of ``job(rank)`` on each rank."""
        before = _generators()
        threads = [
            threading.Thread(target=self._live, args=(job, rank), name=f"rank {rank}", daemon=True)
            for rank in range(self.num_ranks)
        ]
        self._ready.extend(range(self.num_ranks))
        try:
            for thread in threads:
                thread.start()
            self._pass_on()
            self._finished.wait(self.limit)
            return [rank.ended if rank.is_done else rank.given_up() for rank in self._ranks]
        finally:  # also where the user interrupts
            self._is_over = True
            _end(threads)
            _restore(before)

    @property
    def rank(self) -> int:
        """The rank of the running thread."""
        return self._here.rank

    def meet(
        self, key: Hashable, ranks: Sequence[int], signature: str, brings: Any, together: Callable[[dict[int, Any]], None]
    ) -> None:
        """Wait until all ranks have come; the last of them calls ``together`` with what each brings.

        Args:
            key: Names the meeting place.
            ranks: Who meets.
            signature: What this rank comes for, in words; the same on all ranks.
            brings: What it brings.
            together: Works on what the ranks bring, by rank.

        Raises:
            MismatchError: If a rank that came before has come for something else.
            Abandoned: If a rank never comes.
        """
        meeting = self._meetings.setdefault(key, _Meeting(signature))
        if meeting.signature != signature:
            others = ", ".join(map(str, sorted(meeting.brought)))
            msg = f"rank {self.rank} comes to {signature}, and rank {others} to {meeting.signature}"
            raise MismatchError(msg)
        meeting.brought[self.rank] = brings
        if len(meeting.brought) < len(ranks):
            self._wait(signature)
            return
        del self._meetings[key]
        together(meeting.brought)
        self._wake(rank for rank in meeting.brought if rank != self.rank)

    def give(self, key: Hashable, value: Any) -> None:
        """Put a value into a box; no rank waits for that."""
        self._boxes.setdefault(key, deque()).append(value)
        self._wake(rank for rank, other in enumerate(self._ranks) if other.waiting == _box(key))

    def take(self, key: Hashable) -> Any:
        """Take a value out of a box; wait until there is one.

        Raises:
            Abandoned: If nobody ever gives one.
        """
        while not self._boxes.get(key):
            self._wait(_box(key))
        return self._boxes[key].popleft()

    def _live(self, job: Callable[[int], T], rank: int) -> None:
        me = self._ranks[rank]
        self._here.rank = rank
        try:
            me.turn.acquire()
            if not self._is_over:
                me.ended = Ended(job(rank))
        except Abandoned:
            me.ended = Ended(waiting=me.waiting)
        except (Exception, SystemExit) as error:  # noqa: BLE001  the user's code may raise anything
            me.ended = Ended(error=error if isinstance(error, Exception) else RuntimeError(f"SystemExit: {error}"))
        finally:
            me.is_done = True
            self._pass_on()

    def _wait(self, what: str) -> None:
        me = self._ranks[self.rank]
        me.waiting = what
        me.generators = _generators()
        self._pass_on()
        me.turn.acquire()
        if self._is_over:
            raise Abandoned
        me.waiting = ""
        _restore(me.generators)

    def _wake(self, ranks: Iterable[int]) -> None:
        self._ready.extend(rank for rank in ranks if rank not in self._ready)

    def _pass_on(self) -> None:
        """Give the turn to the next rank that can run; if none can, end all that wait."""
        if not self._ready and not all(rank.is_done for rank in self._ranks):
            self._is_over = True
            self._ready.extend(number for number, rank in enumerate(self._ranks) if not rank.is_done)
        if self._ready:
            self._ranks[self._ready.popleft()].turn.release()
        else:
            self._finished.set()


def _end(threads: Sequence[threading.Thread]) -> None:
    """Wait for threads that are at their end; those that still run the user's code get an exception, and some time."""
    for thread in threads:
        if thread.ident is not None:
            thread.join(_GRACE / 10)
    alive = [thread for thread in threads if thread.is_alive()]
    for thread in alive:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Abandoned))
    for thread in alive:
        thread.join(_GRACE)


def _box(key: Hashable) -> str:
    return f"what {key} gives"


def _generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  the global generators


def _restore(states: tuple[Any, ...]) -> None:
    python, numpy, cpu = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)


def seed_generators(seed: int) -> None:
    """Seed the random generators of the running rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
