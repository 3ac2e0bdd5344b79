"""Proofs of laws for all ranks of a plan, with their failures."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

Law = Literal["cover", "source", "ties", "once", "stages", "order", "values"]

LAWS: dict[Law, str] = {
    "cover": "every element of every tensor is held exactly once per replica group",
    "source": "every tensor has exactly one source",
    "ties": "tied tensors stay one tensor, and share one gradient",
    "once": "each gradient that ranks share is summed once, and the module is handed over once",
    "stages": "no rank touches a tensor of another stage",
    "order": "all members of a process group issue the same collectives in the same order",
    "values": "values do not depend on the layout",
}
"""Laws that are proven, by name."""


@frozen
class Failure:
    """Where a law does not hold.

    Args:
        path: The tensor; ``""`` for the plan as a whole.
        cause: The fact, with the coordinate where it was found.
    """

    path: str
    cause: str


@frozen
class Proof:
    """A law, and where it fails: nowhere, if it is proven.

    Args:
        law: Its name.
        num_cases: How many tensors, or messages, were looked at.
        failures: Where it does not hold.
    """

    law: Law
    num_cases: int
    failures: tuple[Failure, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether it is proven."""
        return not self.failures

    def __str__(self) -> str:
        verdict = f"holds ({self.num_cases} cases)" if self.holds else f"fails in {len(self.failures)} cases"
        return f"{self.law:<6}  {LAWS[self.law]}: {verdict}"
