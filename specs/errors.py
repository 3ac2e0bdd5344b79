"""What is wrong with a schedule or a plan: all of it, raised once."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen


@frozen
class Problem:
    """One thing that a user can mend: where, what and how.

    Args:
        path: Tensor, module or pattern that it is about; ``""`` for the model as a whole.
        cause: What is wrong, with the sizes that matter.
        fix: The nearest thing that would be right.
        type: The tensor in its printed form, e.g. ``f32[50257, 1024]``, if it is about a tensor.
    """

    path: str
    cause: str
    fix: str = ""
    type: str = ""

    def __str__(self) -> str:
        head = "  ".join(part for part in (self.path or "(model)", self.type) if part)
        body = f"  {head}: {self.cause}"
        return f"{body}\n      {self.fix}" if self.fix else body


class PlanError(ValueError):
    """Everything that keeps a schedule from becoming a plan, or a plan from being executed.

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
        title = f"{count} problem{'s' if count > 1 else ''}"
        super().__init__("\n".join([title, *map(str, self.problems)]))
