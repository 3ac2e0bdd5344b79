"""The tensors, a row for those of repeated layers, and how each is laid over its mesh axes."""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen

from ....specs.dtypes import human_bytes
from ....specs.fold_layers import fold
from ....specs.listing import source_words
from .axis_strips import interval_words, strips

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.mesh import Mesh
    from ....specs.param import ParamSpec
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ....specs.shard import Shard
    from ....specs.tree import SpecTree

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@frozen
class Row:
    """What stands in a row besides the path.

    Args:
        layout: Which of the layouts it has.
        stages: Stages that hold it, that of the owner first.
        places: The same as places along ``pipe``.
        kind: ``split``, ``whole`` or ``buffer``: what the filter asks for.
        source: Where its values come from, in words.
        notes: What else is to be said.
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
    """Return the rows, and the layouts that they name by number: tensors of one shape, dtype and split share one."""
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
    """Return how many tensors a folded path stands for."""
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
        "index": [interval_words(intervals) for intervals in spec.index(first)],
        "strips": strips(spec, mesh),
    }
