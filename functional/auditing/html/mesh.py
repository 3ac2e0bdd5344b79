"""The mesh as cells: a cell a rank, or, where these are many, a cell for ranks that are alike."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ....specs.mesh import Coordinate
from .memory import memory_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ....specs.mesh import Mesh
    from ....specs.report import Report
    from ....specs.shard import Interval

_MOST_ROWS = 8
_MOST_COLUMNS = 16
_MOST_CELLS = 256


@frozen
class Row:
    """Places along ``data``: runs along its two factors."""

    outer: Interval
    expert: Interval


def mesh(report: Report) -> dict[str, Any]:
    """Return for each stage a table of cells: rows along ``data``, columns along ``tensor``."""
    mesh = report.mesh
    rows, columns = _rows(report), _columns(report)
    numbers = memory_rows(report)
    collapsed = [
        name for name, drawn, num in (("data", rows, mesh.data), ("tensor", columns, mesh.tensor)) if len(drawn) < num
    ]
    return {
        "expert": mesh.expert,
        "collapsed": collapsed,
        "rows": [_row_text(mesh, row) for row in rows],
        "columns": [_text(column) for column in columns],
        "stages": [
            {
                "ranks": _ranks_text(len(stage := mesh.stage(pipe)), stage[0], stage[-1]),
                "cells": [[_cell(report, numbers, pipe, row, column) for column in columns] for row in rows],
            }
            for pipe in range(mesh.pipe)
        ],
    }


def _rows(report: Report) -> list[Row]:
    mesh, distinct = report.mesh, report.distinct
    if mesh.data <= _MOST_ROWS and mesh.num_ranks <= _MOST_CELLS:
        places = (divmod(place, mesh.expert) for place in range(mesh.data))
        return [Row((outer, outer + 1), (expert, expert + 1)) for outer, expert in places]
    return [Row(outer, expert) for outer, expert in product(_few(distinct.expert_data), _few(distinct.expert))]


def _columns(report: Report) -> list[Interval]:
    mesh = report.mesh
    if mesh.tensor <= _MOST_COLUMNS and len(_rows(report)) * mesh.tensor * mesh.pipe <= _MOST_CELLS:
        return [(place, place + 1) for place in range(mesh.tensor)]
    return _few(report.distinct.tensor)


def _few(runs: Sequence[Interval]) -> list[Interval]:
    """Join runs in the middle where they are too many to be drawn one by one."""
    if len(runs) <= _MOST_ROWS:
        return list(runs)
    return [*runs[: _MOST_ROWS - 2], (runs[_MOST_ROWS - 2][0], runs[-2][1]), runs[-1]]


def _cell(report: Report, numbers: dict[Coordinate, int], pipe: int, row: Row, column: Interval) -> dict[str, Any]:
    mesh = report.mesh
    runs = (row.outer, row.expert, column)
    first = _at(mesh, pipe, *(start for start, _ in runs)).rank
    last = _at(mesh, pipe, *(stop - 1 for _, stop in runs)).rank
    num = prod(map(_num, runs))
    node = f", node {first // report.ranks_per_node}" if report.ranks_per_node and num == 1 else ""
    return {
        "first": first,
        "num": f"{num:,}",
        "ranks": _ranks_text(num, first, last),
        "at": f"pipe {pipe}, {_row_words(mesh, row)}, tensor {_text(column)}{node}",
        "places": {"outer": row.outer, "expert": row.expert, "tensor": column},
        "memory": sorted({numbers[kind] for kind in _kinds(report, pipe, runs)}),
    }


def _kinds(report: Report, pipe: int, runs: tuple[Interval, ...]) -> Iterator[Coordinate]:
    """Iterate over the distinct coordinates among the ranks of a cell."""
    distinct = report.distinct
    known = (distinct.expert_data, distinct.expert, distinct.tensor)
    starts = (
        [start, *(first for first, _ in along if start < first < stop)]
        for (start, stop), along in zip(runs, known, strict=True)
    )
    return (distinct.like(_at(report.mesh, pipe, *places)) for places in product(*starts))


def _at(mesh: Mesh, pipe: int, outer: int, expert: int, tensor: int) -> Coordinate:
    return Coordinate(pipe=pipe, data=outer * mesh.expert + expert, tensor=tensor, mesh=mesh)


def _row_text(mesh: Mesh, row: Row) -> str:
    """Write which places along ``data`` a row stands for, in few characters."""
    if mesh.expert == 1:
        return _text(row.outer)
    if _num(row.outer) == _num(row.expert) == 1:
        return str(row.outer[0] * mesh.expert + row.expert[0])
    return f"{_text(row.outer)} / {_text(row.expert)}"


def _row_words(mesh: Mesh, row: Row) -> str:
    if mesh.expert == 1:
        return f"data {_text(row.outer)}"
    finer = f"expert_data {_text(row.outer)}, expert {_text(row.expert)}"
    if _num(row.outer) == _num(row.expert) == 1:
        return f"data {_row_text(mesh, row)} ({finer})"
    return finer


def _ranks_text(num: int, first: int, last: int) -> str:
    """Write ranks as a person says them: those of a cell, which are laid out as a block.

    >>> _ranks_text(1, 3, 3), _ranks_text(4, 4, 7), _ranks_text(127, 8, 1016)
    ('rank 3', 'ranks 4..7', '127 ranks of 8..1016')
    """
    if num == 1:
        return f"rank {first}"
    return f"ranks {first}..{last}" if last - first + 1 == num else f"{num:,} ranks of {first}..{last}"


def _text(run: Interval) -> str:
    """Write places.

    >>> _text((3, 4)), _text((1, 128))
    ('3', '1..127')
    """
    return str(run[0]) if _num(run) == 1 else f"{run[0]}..{run[1] - 1}"


def _num(run: Interval) -> int:
    return run[1] - run[0]
