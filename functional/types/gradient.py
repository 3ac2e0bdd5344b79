"""What ranks hold of the gradient of a value."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from attrs import frozen

Kind = Literal["whole", "summand", "parts", "shared", "unknown"]


@frozen
class Met:
    """Where a whole value meets parts, so that each rank has a part of its gradient.

    Args:
        call: Number of the call.
        value: The whole value.
    """

    call: int
    value: int


@frozen
class Gradient:
    """What ranks hold of the gradient of a value.

    Args:
        kind: ``whole``, ``summand``, ``parts`` (of the value's own parts), ``shared`` (parts, which ranks that hold the same
            entries have to add up), or ``unknown``.
        scale: The ranks hold this multiple of it.
        met: Where summands come from.
        scaled_by: The module at which the multiple began.
        pieces: Where entries along an axis differ: the axis, and start, stop and gradient of each piece; entries between
            have none.
    """

    kind: Kind
    scale: Fraction = Fraction(1)
    met: frozenset[Met] = frozenset()
    scaled_by: str = ""
    pieces: tuple[int, tuple[tuple[int, int, Gradient], ...]] | None = None


UNKNOWN_GRADIENT = Gradient("unknown")
"""A gradient that nobody could follow, as was said where it began."""
