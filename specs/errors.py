"""Problems of a schedule or a plan, collected and raised once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import frozen

from .fold_layers import as_pattern, fold

_HERE = "\0"  # stands for the path, which no path contains


@frozen
class Problem:
    """A problem that a user can mend: its place, its cause, and the fix.

    Args:
        path: Tensor, module or pattern that it is about; ``""`` for the model as a whole.
        cause: The mistake, with the sizes that matter.
        fix: The nearest thing that would be right.
        type: The tensor in its printed form, e.g. ``f32[50257, 1024]``, if it is about a tensor.
    """

    path: str
    cause: str
    fix: str = ""
    type: str = ""

    def __str__(self) -> str:
        return "\n".join(_lines([self]))


class PlanError(ValueError):
    """Everything that keeps a schedule from becoming a plan, or a plan from being executed; repeated layers folded.

    >>> raise PlanError([Problem("lm_head.weight", "nobody initialises it", "Give it values: .init(0.0)")])
    Traceback (most recent call last):
    shardplan.specs.errors.PlanError: 1 problem
      lm_head.weight: nobody initialises it
          Give it values: .init(0.0)
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        assert self.problems, "an error needs a problem"
        count = len(self.problems)
        super().__init__("\n".join([f"{count} problem{'s' if count > 1 else ''}", *_lines(self.problems)]))


def _lines(problems: Iterable[Problem]) -> Iterator[str]:
    """Write problems; problems that differ only in the number of a layer are folded."""
    rows = [(p.path, (p.type, _without(p.path, p.cause), _without(p.path, p.fix))) for p in problems]
    for path, (type_, cause, fix) in fold(rows):
        head = "  ".join(part for part in (path or "(model)", type_) if part)
        yield f"  {head}: {cause.replace(_HERE, path)}"
        if fix:
            yield f"      {fix.replace(_HERE, as_pattern(path))}"


def _without(path: str, text: str) -> str:
    return text.replace(f"{path!r}", f"'{_HERE}'") if path else text
