"""One axis of a tensor as a strip: which of its entries are held at which place along a mesh axis."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ....specs.dtypes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....specs.mesh import Coordinate, Mesh
    from ....specs.param import ParamSpec
    from ....specs.shard import Interval, Shard

_MOST_PLACES = 32
_EDGE = 6
_MOST_BLOCKS = 64


def strips(spec: ParamSpec, mesh: Mesh) -> list[dict[str, Any]]:
    """Return a strip for each axis that is really split on a mesh; none for a tensor that is whole.

    Of many places along a mesh axis the first and the last are drawn; ``skipped`` says which are not, and which entries
    these hold.
    """
    return [_strip(spec, shard, mesh) for shard in spec.shards if mesh.num(shard.mesh_axis) > 1]


def _strip(spec: ParamSpec, shard: Shard, mesh: Mesh) -> dict[str, Any]:
    size, num = spec.orig_shape[shard.axis], mesh.num(shard.mesh_axis)
    drawn = [*range(num)] if num <= _MOST_PLACES else [*range(_EDGE), *range(num - _EDGE, num)]
    parts: dict[Interval, list[int]] = {}
    padding: list[tuple[int, int]] = []
    for place in drawn:
        here = mesh.at(**{shard.mesh_axis: place})
        held = shard.held(size, here)
        for part in held:
            parts.setdefault((part.start, part.stop), []).append(place)
        if unused := shard.length(size, here) - sum(part.stop - part.start for part in held):
            padding.append((place, unused))
    segments = [[start, stop, places] for (start, stop), places in sorted(parts.items())]
    return {
        "axis": shard.axis,
        "mesh_axis": shard.mesh_axis,
        "size": size,
        "num": num,
        "segments": segments,
        "padding": padding,
        "blocks": _blocks(shard, size),
        "empty": [place for place in drawn if not any(place in places for *_, places in segments)],
        "skipped": [] if num <= _MOST_PLACES else [_EDGE, num - _EDGE - 1],
        "places": {str(place): _place(spec, mesh.at(**{shard.mesh_axis: place})) for place in drawn},
    }


def _place(spec: ParamSpec, here: Coordinate) -> list[Any]:
    """Return the intervals of each axis that are held at a coordinate, in words, and their bytes, padding counted."""
    return [[interval_words(intervals) for intervals in spec.index(here)], human_bytes(spec.local_bytes(here))]


def interval_words(intervals: Sequence[Interval]) -> str:
    """Write which entries of an axis are held.

    >>> interval_words([(0, 4), (8, 12)]), interval_words([])
    ('0:4 8:12', 'nothing')
    """
    return " ".join(f"{start}:{stop}" for start, stop in intervals) or "nothing"


def _blocks(shard: Shard, size: int) -> list[int]:
    """Return where blocks begin that are split one by one, but the first; none where they are too many to be seen."""
    sizes = (shard.blocks or (size // shard.interleaved,)) * shard.interleaved
    return [*accumulate(sizes)][:-1] if len(sizes) <= _MOST_BLOCKS else []
