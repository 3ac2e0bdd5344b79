"""Bytes that ranks must receive to go from one plan to another."""

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
from ...specs.index import index_shape
from ...specs.intervals import overlap
from ...specs.plan_diff import Move

if TYPE_CHECKING:
    from ...specs.mesh import Mesh
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@frozen
class RankClass:
    """Ranks that hold the same parts of every tensor as each other, before and after.

    Args:
        rank: The first of them.
        num_ranks: Their number.
        before: Their place along ``pipe`` before; None if the mesh before had no such ranks.
        after: Their place along ``pipe`` after.
    """

    rank: int
    num_ranks: int
    before: int | None
    after: int


def moves(before: Plan, after: Plan) -> tuple[list[Move], int | None, int]:
    """Return the bytes received for each family of tensors, the rank that receives most of all, and its bytes.

    A rank keeps the elements that it held before, and receives each missing element once, in the new dtype. With I the part
    of a tensor that a rank holds, it receives ``|I_after| - |I_before and I_after|`` elements; a rank that is new held
    nothing. Tensors that are not in both plans, or in another shape, are made and not moved, and so are buffers that are not
    saved. Time goes by the places along the mesh axes that split tensors, not by ranks.
    """
    classes = list(_rank_classes(before, after))
    received: dict[object, list[int]] = {}
    families: dict[tuple[str, str, str], list[tuple[str, object, int]]] = {}
    for old, new in _in_both(before, after):
        key = new.orig_shape, old.shards, old.places(before.mesh), new.shards, new.places(after.mesh)
        if key not in received:
            received[key] = _received_elements(old, new, before.mesh, after.mesh, classes)
        family = _NUMBER.sub("*", new.path), old.type, new.type
        families.setdefault(family, []).append((new.path, key, num_bytes(new.dtype)))
    found: list[Move] = []
    everything = [0] * len(classes)
    for (_, *types), members in families.items():
        sizes = [0] * len(classes)
        for (key, item_bytes), times in Counter((key, item_bytes) for _, key, item_bytes in members).items():
            sizes = [size + times * item_bytes * num for size, num in zip(sizes, received[key], strict=True)]
        if total := sum(size * ranks.num_ranks for size, ranks in zip(sizes, classes, strict=True)):
            paths = tuple(path for path, _ in fold((path, ()) for path, *_ in members))
            found.append(Move(paths, len(members), types[0], types[1], total, max(sizes)))
            everything = [size + more for size, more in zip(everything, sizes, strict=True)]
    worst = max(everything)
    return found, classes[everything.index(worst)].rank if worst else None, worst


def _in_both(before: Plan, after: Plan) -> Iterator[tuple[ParamSpec, ParamSpec]]:
    for new in after.tree.values():
        old = next((before.tree[path] for path in new.paths if path in before.tree), None)
        if old is not None and old.orig_shape == new.orig_shape and new.kind != "non_persistent_buffer":
            yield old, new


def _rank_classes(before: Plan, after: Plan) -> Iterator[RankClass]:
    """Iterate over classes of ranks in rank order: within a stage, before and after, shards repeat with a period."""
    period = lcm(*(_period(spec, plan.mesh) for plan in (before, after) for spec in plan.tree.values()))
    sizes = [plan.mesh.num_ranks // plan.mesh.pipe for plan in (before, after)]
    ends = {
        end for plan, size in zip((before, after), sizes, strict=True) for end in range(0, plan.mesh.num_ranks + 1, size)
    }
    for start, stop in pairwise(sorted(end for end in ends if end <= after.mesh.num_ranks)):
        places = start // sizes[0] if start < before.mesh.num_ranks else None, start // sizes[1]
        for rank in range(start, min(stop, start + period)):
            yield RankClass(rank, len(range(rank, stop, period)), *places)


def _period(spec: ParamSpec, mesh: Mesh) -> int:
    """Return the number of neighbouring ranks of a stage after which the shards of a tensor repeat."""
    groups = [mesh.groups(shard.mesh_axis) for shard in spec.shards]
    return max((along.size * along.stride for along in groups if along.size > 1), default=1)


def _received_elements(old: ParamSpec, new: ParamSpec, before: Mesh, after: Mesh, classes: Iterable[RankClass]) -> list[int]:
    """Return the elements of a tensor that a rank of each class receives."""
    periods = _period(old, before), _period(new, after)
    places = old.places(before), new.places(after)
    parts: dict[tuple[int, int], tuple[int, int]] = {}
    received: list[int] = []
    for ranks in classes:
        key = ranks.rank % periods[0], ranks.rank % periods[1]
        if key not in parts:
            held, needed = old.index(before.coordinate(key[0])), new.index(after.coordinate(key[1]))
            parts[key] = prod(index_shape(needed)), prod(map(overlap, held, needed))
        num_needed, num_held = parts[key]
        is_kept = ranks.before in places[0]
        received.append((num_needed - num_held * is_kept) * (ranks.after in places[1]))
    return received
