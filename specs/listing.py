"""A plan as a person reads it: the mesh once, then a line a tensor, repeated layers folded."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING

from .dtypes import human_bytes
from .source import Made
from .steps import AddBiasAfterSync, SetAttributes, Sync, VocabParallel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .param import ParamSpec
    from .plan import Plan
    from .steps import Step

_NUMBER = re.compile(r"(?:(?<=\.)|^)(?:0|[1-9][0-9]*)(?=\.|$)")


def listing(plan: Plan) -> str:
    """Return what ``print(plan)`` shows."""
    first = plan.mesh.coordinate(0)
    lines = [f"plan {plan.fingerprint[:12]}  target={plan.target or 'none'} seed={plan.seed}", str(plan.mesh)]
    rows = [
        (
            spec.path,
            (f"stage {spec.stage}", spec.type, _source(spec), f"{human_bytes(spec.local_bytes(first))}/rank", *_notes(spec)),
        )
        for spec in plan.tree.values()
    ]
    lines += _table((cells[0], path, *cells[1:]) for path, cells in fold(rows))
    layout: dict[str, list[str]] = {}
    for step in plan.steps:
        for module, words in _layout(step):
            layout.setdefault(module, []).append(words)
    changes = fold((module, ("; ".join(words),)) for module, words in layout.items())
    if changes:
        lines += ["", *_table((module or "(model)", *cells) for module, cells in changes)]
    return "\n".join(lines)


def fold(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Join rows whose paths differ only in their numbers and whose other cells are equal.

    >>> fold([(f"layers.{i}.weight", ("f32[4]",)) for i in range(32)])
    [('layers.{0..31}.weight', ('f32[4]',))]
    >>> fold([("layers.0.weight", ("f32[4]",)), ("layers.1.weight", ("f32[8]",))])
    [('layers.0.weight', ('f32[4]',)), ('layers.1.weight', ('f32[8]',))]
    """
    families: dict[tuple[str, tuple[str, ...]], list[tuple[int, ...]]] = {}
    for path, cells in rows:
        numbers = tuple(int(number) for number in _NUMBER.findall(path))
        families.setdefault((_NUMBER.sub("{}", path.replace("{", "{{").replace("}", "}}")), cells), []).append(numbers)
    folded: list[tuple[str, tuple[str, ...]]] = []
    for (template, cells), members in families.items():
        folded += [(template.format(*names), cells) for names in _ranges(members)]
    return folded


def _ranges(members: list[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Name the members by ranges: one name where they are a full product, else one for each run of the first number."""
    columns = [sorted(set(column)) for column in zip(*members, strict=True)]
    if len(members) == 1 or not columns:
        return [tuple(map(str, member)) for member in members]
    full = sorted(members) == list(product(*columns))
    if full and all(column[-1] - column[0] + 1 == len(column) for column in columns):
        return [tuple(str(c[0]) if len(c) == 1 else f"{{{c[0]}..{c[-1]}}}" for c in columns)]
    if len(columns[0]) == 1:
        return [(str(columns[0][0]), *rest) for rest in _ranges([member[1:] for member in members])]
    runs: list[list[int]] = []
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for member in members:
        by_first.setdefault(member[0], []).append(member[1:])
    for number in columns[0]:
        if runs and runs[-1][-1] == number - 1 and by_first[runs[-1][-1]] == by_first[number]:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        (str(run[0]) if len(run) == 1 else f"{{{run[0]}..{run[-1]}}}", *rest)
        for run in runs
        for rest in (_ranges(by_first[run[0]]) if by_first[run[0]] != [()] else [()])
    ]


def _source(spec: ParamSpec) -> str:
    if isinstance(spec.source, Made):
        return "; ".join(dict.fromkeys(str(call) for call in spec.source.calls))
    return str(spec.source)


def _notes(spec: ParamSpec) -> tuple[str, ...]:
    notes = [spec.kind.replace("_", " ")] if spec.kind != "parameter" else []
    notes += ["frozen"] if spec.kind == "parameter" and not spec.requires_grad else []
    notes += [f"= {', '.join(spec.tie)}"] if spec.tie else []
    notes += [f"also on stage {', '.join(map(str, spec.also_on))}"] if spec.also_on else []
    notes += [f"{name}={value!r}" for name, value in spec.tags.items()]
    return (", ".join(notes),)


def _layout(step: Step) -> list[tuple[str, str]]:
    match step:
        case Sync():
            return [(step.module, str(step))]
        case SetAttributes(module=module, values=values):
            return [(module, ", ".join(f"{name}={value!r}" for name, value in values.items()))]
        case VocabParallel(module=module):
            return [(module, "looks up its own rows, zeros for others")]
        case AddBiasAfterSync(module=module):
            return [(module, "adds its bias after the sum")]
        case _:
            return []


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Align all columns but the last."""
    table = [tuple(row) for row in rows]
    if not table:
        return []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
