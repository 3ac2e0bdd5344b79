"""What was found of a rank's run: what ranks hold of its values, and where they differ from the whole model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import Factory, define, frozen

from ...specs.layout_steps import LayoutStep
from .held import Held
from .tape import Tape


@frozen
class Fault:
    """Where a rank computes something else than the whole model.

    Args:
        call: Number of the rank's call; -1 for what the model returns.
        path: The module.
        cause: The fact.
        value: The rank's value that it is about; None if it is about none.
        needs: What would have to be held of that value: ``whole``, ``summand``, or ``""`` for nothing that is known.
        kind: ``forward``, ``gradient``, or ``unfollowed`` for what nobody can tell.
    """

    call: int
    path: str
    cause: str
    value: int | None = None
    needs: str = ""
    kind: Literal["forward", "gradient", "unfollowed"] = "forward"


@define(eq=False)
class Types:
    """What ranks hold of the values of a rank's run.

    Args:
        held: For each value of the rank's tape.
        counterparts: The value of the whole model's tape that it stands for.
        producers: Number of the call that made a value.
        copies: For each value of the whole model's tape that equals an earlier one, that one.
        faults: Where the two differ.
    """

    held: dict[int, Held] = Factory(dict)
    counterparts: dict[int, int] = Factory(dict)
    producers: dict[int, int] = Factory(dict)
    copies: dict[int, int] = Factory(dict)
    faults: list[Fault] = Factory(list)

    def is_split(self, value: int) -> bool:
        """Tell whether ranks hold parts of a value, or summands."""
        return value in self.held and self.held[value].kind in {"parts", "summand"}


@frozen(eq=False)
class Found:
    """A fault, and the run in which it was found.

    Args:
        fault: The fault.
        local: The rank's run.
        types: What ranks hold of its values.
        layout: The layout steps of that run, by place.
    """

    fault: Fault
    local: Tape
    types: Types
    layout: Sequence[LayoutStep]
