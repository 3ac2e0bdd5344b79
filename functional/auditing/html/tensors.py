"""The tensors, with one row for repeated layers, and a strip for each split axis: the entries at each place."""

from __future__ import annotations

import re
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen

from ....specs.dtypes import human_bytes
from ....specs.fold_layers import fold
from ....specs.listing import source_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ....specs.intervals import Interval
    from ....specs.mesh import Coordinate, Mesh
    from ....specs.param import ParamSpec
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ....specs.shard import Shard
    from ....specs.tree import SpecTree

_MOST_PLACES = 32
_EDGE = 6
_MOST_BLOCKS = 64
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@frozen
class Row:
    """One row of the table, but for its path.

    Args:
        layout: Number of its layout.
        stages: Stages that hold the tensor, the owner first.
        places: The places of these stages along ``pipe``.
        kind: ``split``, ``whole`` or ``buffer``, for the filter.
        source: The source of its values, in words.
        notes: Further remarks.
        tie: Its other paths.
    """

    layout: int
    stages: tuple[int, ...]
    places: tuple[int, ...]
    kind: str
    source: str
    notes: tuple[str, ...]
    tie: tuple[str, ...]


def tensors(plan: Plan, report: Report) -> dict[str, Any]:
    """Return the rows and the layouts: tensors of the same shape, dtype and split share a layout."""
    numbers: dict[tuple[tuple[int, ...], str, tuple[Shard, ...]], int] = {}
    layouts: list[dict[str, Any]] = []
    rows: dict[Row, int] = {}
    paths: list[tuple[str, tuple[str]]] = []
    for spec in plan.tree.values():
        key = (spec.orig_shape, spec.dtype, spec.shards)
        if key not in numbers:
            numbers[key] = len(layouts)
            layouts.append(_layout(spec, plan.mesh))
        row = _row(spec, numbers[key], plan.mesh)
        paths.append((spec.path, (str(rows.setdefault(row, len(rows))),)))
    records = [asdict(row) for row in rows]
    return {
        "num": f"{len(plan.tree):,}",
        "num_stages": max(plan.mesh.pipe, len(plan.stages)),
        "replicated": [f"{len(report.replicated):,}", human_bytes(sum(size for *_, size in report.replicated))],
        "layouts": layouts,
        "rows": [{"path": path, "num": _num(path, plan.tree), **records[int(number)]} for path, (number,) in fold(paths)],
    }


def _num(path: str, tree: SpecTree) -> int:
    """Return the number of tensors that a folded path stands for."""
    return 1 if path in tree else prod(int(last) - int(first) + 1 for first, last in _RANGE.findall(path))


def _row(spec: ParamSpec, layout: int, mesh: Mesh) -> Row:
    is_split = bool(spec.mesh_axes(mesh.coordinate(0)))
    return Row(
        layout=layout,
        stages=(spec.stage, *spec.also_on),
        places=spec.places(mesh),
        kind="buffer" if spec.kind != "parameter" else "split" if is_split else "whole",
        source=source_words(spec),
        notes=tuple(_notes(spec)),
        tie=spec.tie,
    )


def _notes(spec: ParamSpec) -> Iterator[str]:
    if spec.kind != "parameter":
        yield spec.kind.replace("_", " ")
    elif not spec.requires_grad:
        yield "frozen"
    if spec.also_on:
        yield f"also on stage {', '.join(map(str, spec.also_on))}"
    yield from (f"{name}={value!r}" for name, value in spec.tags.items())


def _layout(spec: ParamSpec, mesh: Mesh) -> dict[str, Any]:
    first = mesh.coordinate(0)
    most, least = (human_bytes(spec.local_bytes(mesh.coordinate(rank))) for rank in (0, mesh.num_ranks - 1))
    return {
        "type": spec.type,
        "whole": human_bytes(spec.num_bytes),
        "rank": most if most == least else f"{least} to {most}",  # an uneven split gives the first rank most, the last least
        "index": [_interval_words(intervals) for intervals in spec.index(first)],
        "strips": _strips(spec, mesh),
    }


def _strips(spec: ParamSpec, mesh: Mesh) -> list[dict[str, Any]]:
    """Return a strip for each axis that is split on a mesh.

    Of many places along a mesh axis the first and the last are drawn; ``skipped`` holds the first and last place between.
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
        "places": {str(place): _held(spec, mesh.at(**{shard.mesh_axis: place})) for place in drawn},
    }


def _held(spec: ParamSpec, here: Coordinate) -> list[Any]:
    """Return the intervals of each axis that a coordinate holds, in words, and their bytes with padding."""
    return [[_interval_words(intervals) for intervals in spec.index(here)], human_bytes(spec.local_bytes(here))]


def _interval_words(intervals: Sequence[Interval]) -> str:
    """Write intervals of an axis in words.

    >>> _interval_words([(0, 4), (8, 12)]), _interval_words([])
    ('0:4 8:12', 'nothing')
    """
    return " ".join(f"{start}:{stop}" for start, stop in intervals) or "nothing"


def _blocks(shard: Shard, size: int) -> list[int]:
    """Return the starts of separately split blocks, except the first; nothing if there are too many to draw."""
    sizes = (shard.blocks or (size // shard.interleaved,)) * shard.interleaved
    return [*accumulate(sizes)][:-1] if len(sizes) <= _MOST_BLOCKS else []
