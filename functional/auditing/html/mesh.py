"""The mesh as a table of cells: one a rank or, on a large mesh, one for all ranks that are alike."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from ....specs.mesh import STAGE_AXES, factors
from .memory import memory_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ....specs.intervals import Interval
    from ....specs.mesh import Coordinate, Mesh, MeshAxis
    from ....specs.report import Report

_MOST_ROWS = 8
_MOST_COLUMNS = 16
_MOST_CELLS = 256

*_DOWN, _ACROSS = STAGE_AXES

Runs = dict["MeshAxis", "Interval"]
"""First place and place after the last along some mesh axes; an axis with factors is given by its factors."""


def mesh(report: Report) -> dict[str, Any]:
    """Return a table of cells for each stage: columns along its last mesh axis, rows along its other axes."""
    mesh = report.mesh
    rows, columns = _rows(report), _columns(report)
    numbers = memory_rows(report)
    collapsed = [*_DOWN] if len(rows) < mesh.num(*_DOWN) else []
    collapsed += [_ACROSS] if len(columns) < mesh.num(_ACROSS) else []
    return {
        "collapsed": collapsed,
        "down": " / ".join(factors(*_DOWN) if len(rows) < mesh.num(*_DOWN) and mesh.expert > 1 else _DOWN),
        "across": _ACROSS,
        "factors": {m: [*factors(m), mesh.num(factors(m)[-1])] for m in STAGE_AXES if len(factors(m)) > 1},
        "rows": [_row_text(mesh, row) for row in rows],
        "columns": [_text(column) for column in columns],
        "stages": [
            {
                "ranks": _ranks_text(len(stage := mesh.stage(pipe)), stage[0], stage[-1]),
                "cells": [[_cell(report, numbers, pipe, row | {_ACROSS: column}) for column in columns] for row in rows],
            }
            for pipe in range(mesh.pipe)
        ],
    }


def _rows(report: Report) -> list[Runs]:
    mesh, names = report.mesh, factors(*_DOWN)
    if mesh.num(*_DOWN) <= _MOST_ROWS and mesh.num_ranks <= _MOST_CELLS:
        along = [[(place, place + 1) for place in range(mesh.num(name))] for name in names]
    else:
        along = [_few(report.distinct.runs(name)) for name in names]
    return [dict(zip(names, runs, strict=True)) for runs in product(*along)]


def _columns(report: Report) -> list[Interval]:
    mesh, num = report.mesh, report.mesh.num(_ACROSS)
    if num <= _MOST_COLUMNS and len(_rows(report)) * num * mesh.pipe <= _MOST_CELLS:
        return [(place, place + 1) for place in range(num)]
    return _few(report.distinct.runs(_ACROSS))


def _few(runs: Sequence[Interval]) -> list[Interval]:
    """Join the runs in the middle if there are too many to draw."""
    if len(runs) <= _MOST_ROWS:
        return list(runs)
    return [*runs[: _MOST_ROWS - 2], (runs[_MOST_ROWS - 2][0], runs[-2][1]), runs[-1]]


def _cell(report: Report, numbers: dict[Coordinate, int], pipe: int, runs: Runs) -> dict[str, Any]:
    mesh = report.mesh
    first = mesh.at(pipe=pipe, **{name: start for name, (start, _) in runs.items()}).rank
    last = mesh.at(pipe=pipe, **{name: stop - 1 for name, (_, stop) in runs.items()}).rank
    num = prod(map(_num, runs.values()))
    node = f", node {first // report.ranks_per_node}" if report.ranks_per_node and num == 1 else ""
    return {
        "first": first,
        "num": f"{num:,}",
        "ranks": _ranks_text(num, first, last),
        "at": ", ".join([f"pipe {pipe}", *(_words(mesh, runs, mesh_axis) for mesh_axis in STAGE_AXES)]) + node,
        "places": runs,
        "memory": sorted({numbers[kind] for kind in _kinds(report, pipe, runs)}),
    }


def _kinds(report: Report, pipe: int, runs: Runs) -> Iterator[Coordinate]:
    """Iterate over the distinct coordinates among the ranks of a cell."""
    starts = (
        [start, *(first for first, _ in report.distinct.runs(name) if start < first < stop)]
        for name, (start, stop) in runs.items()
    )
    found = (report.mesh.at(pipe=pipe, **dict(zip(runs, places, strict=True))) for places in product(*starts))
    return map(report.distinct.like, found)


def _row_text(mesh: Mesh, row: Runs) -> str:
    """Write the places of a row in short."""
    return ", ".join(_place(mesh, row, mesh_axis) for mesh_axis in _DOWN)


def _place(mesh: Mesh, runs: Runs, mesh_axis: MeshAxis) -> str:
    """Write the places along a mesh axis: a lone place as its number, else runs along the axis' factors."""
    along = {name: runs[name] for name in factors(mesh_axis) if name == factors(mesh_axis)[0] or mesh.num(name) > 1}
    if all(_num(run) == 1 for run in along.values()):
        return str(mesh.at(**{name: start for name, (start, _) in along.items()}).index(mesh_axis))
    return " / ".join(map(_text, along.values()))


def _words(mesh: Mesh, runs: Runs, mesh_axis: MeshAxis) -> str:
    """Write the places along a mesh axis, and along its factors if it has several."""
    names = factors(mesh_axis)
    finer = ", ".join(f"{name} {_text(runs[name])}" for name in names)
    if mesh.num(names[-1]) == 1 or len(names) == 1:
        return f"{mesh_axis} {_text(runs[names[0]])}"
    return f"{mesh_axis} {_place(mesh, runs, mesh_axis)} ({finer})" if all(_num(runs[n]) == 1 for n in names) else finer


def _ranks_text(num: int, first: int, last: int) -> str:
    """Write the ranks of a cell in words.

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
