"""What a verb applies to, ``sch.at[pattern]``, and which line of the user's code says it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from ...specs.errors import Problem
from ...specs.pattern import compile_pattern

if TYPE_CHECKING:
    from ..schedule import Schedule

_PACKAGE = str(Path(__file__).parent)


@frozen
class At:
    """``sch.at``: waits for a pattern in brackets."""

    schedule: Schedule

    def __getitem__(self, pattern: str) -> Schedule:
        if not isinstance(pattern, str):
            msg = f"sch.at[pattern] takes one string, not {pattern!r}; several names are written {{a,b}}"
            raise TypeError(msg)
        try:
            compile_pattern(pattern)
        except ValueError as error:
            problem = Problem(pattern, str(error), "Close it, or write ? for a bracket that belongs to a name")
            return evolve(self.schedule, problems=(*self.schedule.problems, problem), pattern=pattern)
        return evolve(self.schedule, pattern=pattern)


def join(module: str, name: str) -> str:
    """Return the path of what a module names so.

    >>> join("model.norm", "weight"), join("", "weight")
    ('model.norm.weight', 'weight')
    """
    return f"{module}.{name}" if module else name


def caller() -> str:
    """Return the file and line outside this package that called a verb."""
    frame = sys._getframe(1)  # noqa: SLF001  inspect.stack would read source files
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
