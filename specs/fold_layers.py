"""Rows that repeat from layer to layer, written once: ``layers.{0..31}.weight``."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_NUMBER = re.compile(r"(?:(?<=\.)|^)(?:0|[1-9][0-9]*)(?=\.|$)")
_RANGE = re.compile(r"\{\d+\.\.\d+\}")


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
    """Name the members by ranges: a single name for a full product, else a name for each run of the first number."""
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


def as_pattern(folded: str) -> str:
    """Return a glob that selects at least the paths that a folded path stands for.

    >>> as_pattern("layers.{0..31}.weight")
    'layers.*.weight'
    """
    return _RANGE.sub("*", folded)
