"""Rows of text as aligned columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_NUMBER = re.compile(r"[\d., ]+( (B|[KMGT]iB))?")
_FEW = 2


def table(rows: Iterable[tuple[str, ...]], *, right: bool = False) -> list[str]:
    """Return rows of equal length as lines; with ``right`` columns of numbers and sizes are aligned on the right.

    >>> table([("stage", "bytes"), ("0", "1.5 KiB"), ("1", "12 B")], right=True)
    ['stage    bytes', '    0  1.5 KiB', '    1     12 B']
    """
    cells = [tuple(row) for row in rows]
    if not cells:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    is_number = [right and all(_NUMBER.fullmatch(row[column]) for row in cells[1:]) for column in range(len(widths))]
    return ["  ".join(_pad(*args) for args in zip(row, widths, is_number, strict=True)).rstrip() for row in cells]


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers, with consecutive numbers as a range.

    >>> ranges([0, 1, 2, 3, 7, 15, 16])
    '0..3, 7, 15, 16'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > _FEW else ", ".join(map(str, run)) for run in runs)


def _pad(cell: str, width: int, is_number: bool) -> str:  # noqa: FBT001  one of three columns of a zip
    return cell.rjust(width) if is_number else cell.ljust(width)
