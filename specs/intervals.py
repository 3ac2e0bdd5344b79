"""Arithmetic of intervals: some entries of an axis, as disjoint intervals in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Interval = tuple[int, int]
"""Consecutive entries of an axis: first entry, and end (exclusive)."""


def common(first: Iterable[Interval], second: Sequence[Interval]) -> tuple[Interval, ...]:
    """Return the entries that are in both of two sets of intervals.

    >>> common(((0, 4), (8, 12)), ((2, 10),))
    ((2, 4), (8, 10))
    """
    pairs = ((max(a, c), min(b, d)) for a, b in first for c, d in second)
    return tuple(sorted((start, stop) for start, stop in pairs if start < stop))


def without(intervals: tuple[Interval, ...], gone: Iterable[Interval]) -> tuple[Interval, ...]:
    """Remove entries from intervals.

    >>> without(((0, 8),), ((2, 4), (6, 9)))
    ((0, 2), (4, 6))
    """
    for low, high in gone:
        cut = [((start, min(stop, low)), (max(start, high), stop)) for start, stop in intervals]
        intervals = tuple((start, stop) for pair in cut for start, stop in pair if start < stop)
    return intervals


def overlap(first: Iterable[Interval], second: Sequence[Interval]) -> int:
    """Return how many entries two sets of intervals have in common.

    >>> overlap(((0, 4), (8, 12)), ((2, 10),))
    4
    """
    return sum(stop - start for start, stop in common(first, second))


def placed(own: Iterable[Interval], some: Sequence[Interval]) -> Iterator[tuple[Interval, Interval]]:
    """Iterate over the entries of ``own`` that are also in ``some``, each interval with its place among all of ``own``.

    >>> list(placed(((2, 4), (8, 12)), ((3, 10),)))
    [((3, 4), (1, 2)), ((8, 10), (2, 4))]
    """
    place = 0
    for first, last in own:
        for low, high in common(((first, last),), some):
            yield (low, high), (place + low - first, place + high - first)
        place += last - first


def between(intervals: Iterable[Interval], first: int, last: int) -> tuple[Interval, ...]:
    """Return the entries number ``first`` to ``last`` (exclusive) of the intervals, all their entries counted in order.

    >>> between(((2, 4), (8, 12)), 1, 4)
    ((3, 4), (8, 10))
    """
    found: list[Interval] = []
    place = 0
    for start, stop in intervals:
        low, high = max(first, place), min(last, place + stop - start)
        if low < high:
            found.append((start + low - place, start + high - place))
        place += stop - start
    return tuple(found)
