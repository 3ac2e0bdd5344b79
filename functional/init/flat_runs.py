"""The elements of a part as runs of consecutive flat indices of the whole tensor.

A part is row-major: its elements, in order, are run after run. The start of run q follows from q by at most three
divisions in any layout, so that a kernel needs only a table with a row for each stretch of runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from attrs import frozen

from ...specs.index import row_major

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...specs.index import Index
    from ...specs.intervals import Interval

_MAX_OUTER = 3


@frozen
class Runs:
    """Runs of equal length.

    Args:
        start: Flat index of the first element of the first run.
        length: Elements of each run.
        counts: Number of runs along each of three axes, innermost first.
        strides: Elements from a run to the next along these axes.
    """

    start: int
    length: int
    counts: tuple[int, int, int]
    strides: tuple[int, int, int]

    @property
    def num_runs(self) -> int:
        """Total number of runs."""
        return prod(self.counts)

    @property
    def num_elements(self) -> int:
        """Total number of elements."""
        return self.num_runs * self.length


@lru_cache(maxsize=4096)
def runs_of(shape: tuple[int, ...], index: Index) -> tuple[Runs, ...]:
    """Return the runs of a part, in the part's own row-major order.

    >>> runs_of((8, 6), (((2, 4),), ((0, 3),)))
    (Runs(start=12, length=3, counts=(2, 1, 1), strides=(6, 0, 0)),)
    >>> runs_of((8, 6), (((2, 4),), ((0, 6),)))
    (Runs(start=12, length=12, counts=(1, 1, 1), strides=(0, 0, 0)),)
    >>> [runs.start for runs in runs_of((2, 8), (((0, 2),), ((0, 2), (4, 6))))]
    [0, 4, 8, 12]
    """
    return tuple(runs for box in _boxes(index) for runs in _runs_of_box(shape, box))


def _boxes(index: Index) -> Iterator[tuple[Interval, ...]]:
    """Iterate over boxes that, in sequence, hold the elements of a part in its row-major order.

    Each index of the axes before the last axis of several intervals is a box of its own.
    """
    several = [axis for axis, intervals in enumerate(index) if len(intervals) > 1]
    last = several[-1] if several else 0
    around = [[(at, at + 1) for interval in intervals for at in range(*interval)] for intervals in index[:last]]
    return product(*around, *index[last:])


def _runs_of_box(shape: tuple[int, ...], box: tuple[Interval, ...]) -> Iterator[Runs]:
    merged: list[tuple[int, int]] = []  # elements and stride, outermost first; a whole axis joins the axis around it
    start = 0
    for size, stride, (low, high) in zip(shape, row_major(shape), box, strict=True):
        start += low * stride
        if merged and high - low == size:
            merged[-1] = merged[-1][0] * size, stride
        else:
            merged.append((high - low, stride))
    *outer, (length, _) = merged or [(1, 1)]
    if length == 0 or any(count == 0 for count, _ in outer):
        return
    outer = [(count, stride) for count, stride in outer if count > 1]
    spread, inner = outer[:-_MAX_OUTER], [*outer[-1 : -_MAX_OUTER - 1 : -1], *[(1, 0)] * _MAX_OUTER][:_MAX_OUTER]
    counts, strides = tuple(count for count, _ in inner), tuple(stride for _, stride in inner)
    offsets = (sum(at) for at in product(*(range(0, count * stride, stride) for count, stride in spread)))
    yield from (Runs(start + offset, length, counts, strides) for offset in offsets)  # pyright: ignore[reportArgumentType]  three of each


@frozen
class Stretch:
    """Consecutive elements of a part: several whole runs, or a piece of a single run.

    Args:
        runs: The runs that it is taken from.
        first: Number of its first run.
        num_runs: Number of its runs.
        skip: Elements left out at the start of the run, for a piece of a run.
        length: Elements of each run.
    """

    runs: Runs
    first: int
    num_runs: int
    skip: int
    length: int

    @property
    def num_elements(self) -> int:
        """Total number of elements."""
        return self.num_runs * self.length

    def row(self, key: tuple[int, int], out: int) -> tuple[int, ...]:
        """Return its row of a table; ``out`` is the place of its first element in the output."""
        (n1, n2, _), (s1, s2, s3) = self.runs.counts, self.runs.strides
        return (*key, out, self.runs.start + self.skip, self.length, self.first, self.num_runs, n1, n2, s1, s2, s3)


KEY0, KEY1, OUT, START, LENGTH, FIRST, NUM_RUNS, N1, N2, S1, S2, S3 = range(12)
"""Columns of a table. The first element of run FIRST + r goes to OUT + r * LENGTH."""


def stretches(runs: Runs, room: int, size: int) -> Iterator[Stretch]:
    """Cut runs into stretches of at most ``room`` elements for the first, and ``size`` for each further stretch."""
    run, skip = 0, 0
    while run < runs.num_runs:
        if skip or runs.length > room:
            length = min(runs.length - skip, room)
            yield Stretch(runs, run, 1, skip, length)
            room -= length
            skip += length
            if skip == runs.length:
                run, skip = run + 1, 0
        else:
            num = min(room // runs.length, runs.num_runs - run)
            yield Stretch(runs, run, num, 0, runs.length)
            room -= num * runs.length
            run += num
        room = room or size


def first_and_last(table: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the smallest and the largest flat index in each row of a table."""
    first = _flat_start(table, table[:, FIRST])
    last = _flat_start(table, table[:, FIRST] + table[:, NUM_RUNS] - 1) + table[:, LENGTH] - 1
    return first, last


def elements(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the flat index of every element of a table, in order."""
    return np.concatenate([np.empty(0, np.int64), *(_of_row(row) for row in table[:, None])])


def _of_row(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the flat index of every element of a table with a single row."""
    starts = _flat_start(row, row[0, FIRST] + np.arange(row[0, NUM_RUNS]))
    return (starts[:, None] + np.arange(row[0, LENGTH])).reshape(-1)


def _flat_start(table: NDArray[np.int64], run: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the flat index at which a run starts, for each row of a table."""
    outer, inner = np.divmod(run, table[:, N1])
    outermost, middle = np.divmod(outer, table[:, N2])
    return table[:, START] + inner * table[:, S1] + middle * table[:, S2] + outermost * table[:, S3]
