"""A call of an operator in both models, and why a rank's is not what the whole model's is."""

from __future__ import annotations

from attrs import frozen

from .held import Held
from .relation import Rule, Shape


@frozen
class Misuse:
    """Why an operator does not compute on the ranks what it computes in the whole model.

    Args:
        cause: The fact, as a sentence about the operands.
        operand: Number of the operand that it is about.
        needs: What would be needed of that operand: ``whole`` or nothing that is known.
        path: The module that is to blame, if it is not the operator's.
        is_open: Whether ranks may be right all the same, by a layout that types cannot say.
    """

    cause: str
    operand: int = 0
    needs: str = ""
    path: str | None = None
    is_open: bool = False


@frozen
class Call:
    """A call of an operator in both models.

    Args:
        name: The operator.
        rule: The rule for the whole model's call.
        local_rule: The rule for a rank's call.
        operands: What ranks hold of its operands.
        shapes: Shapes of the results in the whole model.
        local_shapes: Shapes of the results on a rank.
        num_ranks: Ranks along ``tensor``.
        rank: The rank whose call it is.
    """

    name: str
    rule: Rule
    local_rule: Rule
    operands: tuple[Held, ...]
    shapes: tuple[Shape, ...]
    local_shapes: tuple[Shape, ...]
    num_ranks: int
    rank: int = 0


def counted_twice(call: Call, number: int) -> Misuse:
    """Return the misuse of a whole operand that each rank adds to a sum over ranks."""
    return Misuse(f"a whole value meets summands in {call.name}, and each rank adds it", number, "summand")
