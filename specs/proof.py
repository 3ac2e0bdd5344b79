"""Proofs of laws for all ranks of a plan, with their failures, and with what nobody could follow."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from .equality import Unfollowed, in_words

Law = Literal["cover", "source", "ties", "once", "stages", "order", "values", "equal"]

LAWS: dict[Law, str] = {
    "cover": "every element of every tensor is held exactly once per replica group",
    "source": "every tensor has exactly one source",
    "ties": "tied tensors stay one tensor, and share one gradient",
    "once": "each gradient that ranks share is summed once, and the module is handed over once",
    "stages": "no rank touches a tensor of another stage",
    "order": "all members of a process group issue the same collectives in the same order",
    "values": "values do not depend on the layout",
    "equal": "the split model computes what the whole one does",
}
"""Laws that are proven, by name."""

_FEW = 5


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
    """A law, where it fails, and where nobody could follow it: nowhere, if it is proven.

    Args:
        law: Its name.
        num_cases: How many tensors, messages or computed activations were looked at.
        failures: Where it does not hold.
        unfollowed: Where it is not known whether it holds.
        remark: What else is to be known of the proof; empty for nothing.
    """

    law: Law
    num_cases: int
    failures: tuple[Failure, ...] = ()
    unfollowed: tuple[Unfollowed, ...] = ()
    remark: str = ""

    @property
    def answer(self) -> Literal["holds", "fails", "not followed"]:
        """Whether it is proven, or is found to fail, or neither."""
        if self.failures:
            return "fails"
        return "not followed" if self.unfollowed else "holds"

    @property
    def holds(self) -> bool:
        """Whether it is proven."""
        return self.answer == "holds"

    def __str__(self) -> str:
        head = f"{self.law:<6}  {LAWS[self.law]}: {self.answer}"
        match self.answer:
            case "holds":
                return f"{head} ({'; '.join(filter(None, (f'{self.num_cases} cases', self.remark)))})"
            case "fails":
                return f"{head} in {len(self.failures)} cases"
            case "not followed":
                first, *more = in_words(self.unfollowed)
                if not more:
                    return f"{head}: {first}"
                shown = [f"        {case}" for case in (first, *more)[:_FEW]]
                rest = len(more) + 1 - len(shown)
                shown += [f"        and {rest} more"] if rest else []
                return "\n".join([f"{head} in {len(more) + 1} places", *shown])
