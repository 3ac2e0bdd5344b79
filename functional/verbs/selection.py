"""What a verb applies to, ``sch.at[pattern]``, and which line of the user's code says it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Generic

from attrs import evolve, frozen

from ...specs.declaration import D
from ...specs.errors import Problem
from ...specs.pattern import compile_pattern

_PACKAGE = str(Path(__file__).parent.parent)


@frozen
class At(Generic[D]):
    """``sch.at``: waits for a pattern in brackets."""

    schedule: D

    def __getitem__(self, pattern: str) -> D:
        if not isinstance(pattern, str):
            msg = f"sch.at[pattern] takes one string, not {pattern!r}; several names are written {{a,b}}"
            raise TypeError(msg)
        try:
            compile_pattern(pattern)
        except ValueError as error:
            problem = Problem(pattern, str(error), "Close it, or write ? for a bracket that belongs to a name")
            return evolve(self.schedule, problems=(*self.schedule.problems, problem), pattern=pattern)
        return evolve(self.schedule, pattern=pattern)


def caller() -> str:
    """Return the file and line outside this package that called a verb."""
    frame = sys._getframe(1)  # noqa: SLF001  inspect.stack would read source files
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
