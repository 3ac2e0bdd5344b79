"""The messages of ranks: sums by stage and mesh axis, and their rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ....specs.dtypes import human_bytes
from ....specs.mesh import in_mesh_order
from ....specs.text_table import ranges

if TYPE_CHECKING:
    from ....specs.report import Report

Key = TypeVar("Key", bound=Hashable)


def traffic(report: Report) -> dict[str, Any]:
    """Return the sums of a training step, its messages, the tensors sent between stages, and the messages of execution."""
    return {
        "nodes": report.ranks_per_node is not None,
        "matrix": _matrix(report),
        "steps": [_step(stages, *row) for row, stages in _by_stage(_steps(report))],
        "boundaries": [
            [stages, f"{num:,}", human_bytes(size), human_bytes(back)]
            for (num, size, back), stages in _by_stage(
                ((b.num_tensors, b.num_bytes, b.gradient_bytes), b.stage) for b in report.boundaries
            )
        ],
        "execution": list(_execution(report)),
    }


def _matrix(report: Report) -> dict[str, Any]:
    """Sum the bytes that a rank of each stage sends along each mesh axis."""
    columns = sorted({row.mesh_axis for row in report.training}, key=lambda mesh_axis: in_mesh_order([mesh_axis]))
    sums = {(stage, mesh_axis): (0, 0) for stage in range(report.mesh.pipe) for mesh_axis in columns}
    for row in report.training:
        wire, between = sums[row.stage, row.mesh_axis]
        sums[row.stage, row.mesh_axis] = wire + row.wire_bytes, between + row.between_bytes
    rows = ((tuple(sums[stage, mesh_axis] for mesh_axis in columns), stage) for stage in range(report.mesh.pipe))
    return {
        "columns": columns,
        "most": max((wire for wire, _ in sums.values()), default=0),
        "rows": [
            [stages, [[wire, human_bytes(wire), human_bytes(between)] for wire, between in cells]]
            for cells, stages in _by_stage(rows)
        ],
    }


def _steps(report: Report) -> Iterator[tuple[tuple[Any, ...], int]]:
    for row in report.training:
        sizes = (row.num_bytes, row.wire_bytes, row.inside_bytes, row.between_bytes)
        yield (row.mesh_axis, row.cargo, row.op, row.num_calls, *sizes), row.stage


def _step(stages: str, mesh_axis: str, cargo: str, op: str, num_calls: int, *sizes: int) -> dict[str, Any]:
    num_bytes, wire, inside, between = map(human_bytes, sizes)
    cells = [stages, mesh_axis, cargo, op, f"{num_calls:,}", num_bytes]
    return {"cells": cells, "wire_bytes": sizes[1], "wire": wire, "inside": inside, "between": between}


def _execution(report: Report) -> Iterator[list[str]]:
    """Iterate over the messages of execution; ranks with the same messages share a row."""
    num_ranks = {share.coordinate: share.num_ranks for share in report.shares}
    alike: dict[tuple[Any, ...], dict[int, int]] = {}
    for row in report.execution:
        stages = alike.setdefault((row.mesh_axes, row.op, row.num_calls, row.num_bytes), {})
        stages[row.coordinate.pipe] = stages.get(row.coordinate.pipe, 0) + num_ranks[row.coordinate]
    for (mesh_axes, op, num_calls, num_bytes), stages in alike.items():
        over = " × ".join(mesh_axes) or "all ranks"
        yield [ranges(stages), f"{sum(stages.values()):,}", over, op, f"{num_calls:,}", human_bytes(num_bytes)]


def _by_stage(rows: Iterable[tuple[Key, int]]) -> Iterator[tuple[Key, str]]:
    """Iterate over distinct rows, each with its stages."""
    stages: dict[Key, list[int]] = {}
    for row, stage in rows:
        stages.setdefault(row, []).append(stage)
    return ((row, ranges(numbers)) for row, numbers in stages.items())
