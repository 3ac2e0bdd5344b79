"""What a dialect gives back."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen
from frozendict import frozendict


@frozen
class Wrapped:
    """A model as a runtime wants it.

    Args:
        model: What is trained: the module, or the runtime's engine around it.
        optimizer: The runtime's optimizer, or the given one; None if there is none.
        extras: Whatever else the runtime returned, by name.
    """

    model: Any
    optimizer: Any
    extras: frozendict[str, Any] = field(factory=frozendict, converter=frozendict)
