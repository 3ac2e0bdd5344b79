"""What ranks must receive to go from one plan to another. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import lcm, prod
from typing import TYPE_CHECKING

from attrs import frozen

from ...specs.dtypes import num_bytes
from ...specs.fold_layers import fold
from ...specs.index import whole_index
from ...specs.plan_diff import Move

if TYPE_CHECKING:
    from ...specs.index import Index
    from ...specs.mesh import Mesh
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.shard import Interval, Shard

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@frozen
class Segment:
    """Neighbouring ranks that stand in one stage, and stood in one.

    Args:
        start: The first.
        stop: The one after the last.
        before: Place along ``pipe`` where they stood; None if there were no such ranks.
        after: Place along ``pipe`` where they stand.
    """

    start: int
    stop: int
    before: int | None
    after: int


@frozen
class Layout:
    """How a tensor lies, before and after: tensors of one layout ask for the same elements.

    Args:
        shape: Its shape.
        before: How it was split.
        stood: Places along ``pipe`` that held it.
        after: How it is split.
        stands: Places along ``pipe`` that hold it.
    """

    shape: tuple[int, ...]
    before: tuple[Shard, ...]
    stood: tuple[int, ...]
    after: tuple[Shard, ...]
    stands: tuple[int, ...]


Needs = dict[tuple[int, Segment], dict[int, int]]
"""Bytes that ranks of a segment receive: by a period, and by a rank's place in it."""


def moves(before: Plan, after: Plan) -> tuple[list[Move], int | None, int]:
    """Return what must be received family by family, the rank that receives most, and how much that is.

    A rank that held an element keeps it; one that needs an element which it has not receives it once, in the dtype that it
    will have. With I the part of a tensor that a rank holds, it receives ``|I_after| - |I_before and I_after|`` elements;
    ranks that were not there held nothing. Tensors that are not in both plans, or in another shape, are made and not moved,
    and so are buffers that are not saved. It takes as long as there are places along the mesh axes that tensors are split
    over, and stages, not as there are ranks.
    """
    segments = list(_segments(before.mesh, after.mesh))
    known: dict[Layout, dict[tuple[int, Segment], dict[int, int]]] = {}
    families: dict[tuple[str, str, str], list[tuple[ParamSpec, Layout]]] = {}
    for old, new in _in_both(before, after):
        layout = Layout(new.orig_shape, old.shards, old.places(before.mesh), new.shards, new.places(after.mesh))
        if layout not in known:
            known[layout] = _elements(layout, before.mesh, after.mesh, segments)
        families.setdefault((_NUMBER.sub("*", new.path), old.type, new.type), []).append((new, layout))
    found: list[Move] = []
    everything: Needs = {}
    for (_, *types), members in families.items():
        needs: Needs = {}
        for (layout, size), times in Counter((layout, num_bytes(spec.dtype)) for spec, layout in members).items():
            _add(needs, known[layout], times * size)
        if total := _total(needs):
            paths = tuple(path for path, _ in fold((spec.path, ()) for spec, _ in members))
            found.append(Move(paths, len(members), types[0], types[1], total, _worst(needs)[1]))
            _add(everything, needs, 1)
    return found, *_worst(everything)


def _in_both(before: Plan, after: Plan) -> Iterator[tuple[ParamSpec, ParamSpec]]:
    for new in after.tree.values():
        old = next((before.tree[path] for path in new.paths if path in before.tree), None)
        if old is not None and old.orig_shape == new.orig_shape and new.kind != "non_persistent_buffer":
            yield old, new


def _segments(before: Mesh, after: Mesh) -> Iterator[Segment]:
    """Iterate over the ranks, cut wherever a stage ends, before or after."""
    num = after.num_ranks
    sizes = [mesh.num_ranks // mesh.pipe for mesh in (before, after)]
    ends = {end for mesh, size in zip((before, after), sizes, strict=True) for end in range(0, mesh.num_ranks + 1, size)}
    bounds = sorted(end for end in ends if end <= num)
    for start, stop in pairwise(bounds):
        stood = start // sizes[0] if start < before.num_ranks else None
        yield Segment(start, stop, stood, start // sizes[1])


def _elements(layout: Layout, before: Mesh, after: Mesh, segments: Iterable[Segment]) -> Needs:
    """Return the elements that ranks receive of one tensor; what a rank holds repeats along the ranks of a stage."""
    periods = _period(before, layout.before), _period(after, layout.after)
    parts: dict[tuple[int, int], tuple[int, int]] = {}

    def part(rank: int) -> tuple[int, int]:
        """How many elements a rank needs, and how many of these it had if its stage had the tensor."""
        key = rank % periods[0], rank % periods[1]
        if key not in parts:
            old, new = _index(layout.shape, layout.before, before, key[0]), _index(layout.shape, layout.after, after, key[1])
            both = prod(_overlap(one, other) for one, other in zip(old, new, strict=True))
            parts[key] = prod(sum(stop - start for start, stop in intervals) for intervals in new), both
        return parts[key]

    needs: Needs = {}
    for segment in segments:
        if segment.after in layout.stands:
            kept = segment.before in layout.stood
            period = lcm(*periods) if kept else periods[1]
            ranks = range(segment.start, min(segment.stop, segment.start + period))
            needs[period, segment] = {rank % period: part(rank)[0] - part(rank)[1] * kept for rank in ranks}
    return needs


def _period(mesh: Mesh, shards: Iterable[Shard]) -> int:
    """Return after how many ranks of a stage the parts of a tensor come again."""
    groups = [mesh.groups(shard.mesh_axis) for shard in shards]
    return max((along.size * along.stride for along in groups if along.size > 1), default=1)


def _index(shape: tuple[int, ...], shards: Iterable[Shard], mesh: Mesh, rank: int) -> Index:
    intervals = list(whole_index(shape))
    for shard in shards:
        intervals[shard.axis] = shard.intervals(shape[shard.axis], mesh.coordinate(rank))
    return tuple(intervals)


def _overlap(one: Iterable[Interval], other: Iterable[Interval]) -> int:
    pairs = ((a, b) for a in one for b in other)
    return sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in pairs)


def _add(needs: Needs, more: Needs, times: int) -> None:
    for key, amounts in more.items():
        mine = needs.setdefault(key, {})
        for place, amount in amounts.items():
            mine[place] = mine.get(place, 0) + times * amount


def _total(needs: Needs) -> int:
    """Return the bytes of all ranks: each amount as often as there are ranks at its place of the period."""
    return sum(
        amount * len(range(segment.start + (place - segment.start) % period, segment.stop, period))
        for (period, segment), amounts in needs.items()
        for place, amount in amounts.items()
    )


def _worst(needs: Needs) -> tuple[int | None, int]:
    """Return the first rank that receives most, and how much; None where nothing is received."""
    by_segment: dict[Segment, list[tuple[int, dict[int, int]]]] = {}
    for (period, segment), amounts in needs.items():
        by_segment.setdefault(segment, []).append((period, amounts))
    worst: tuple[int | None, int] = (None, 0)
    for segment, tables in sorted(by_segment.items(), key=lambda item: item[0].start):
        period = lcm(*(period for period, _ in tables))
        for rank in range(segment.start, min(segment.stop, segment.start + period)):
            amount = sum(amounts[rank % period] for period, amounts in tables)
            if amount > worst[1]:
                worst = rank, amount
    return worst
