"""What ranks hold of the gradient of a value."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from attrs import evolve, frozen

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


def flat_pieces(gradient: Gradient) -> Iterator[Gradient]:
    """Iterate over the gradients of a gradient's pieces; over itself if it has none."""
    if gradient.pieces is None:
        yield gradient
    else:
        for _, _, inner in gradient.pieces[1]:
            yield from flat_pieces(inner)


def merged_pieces(found: list[Gradient]) -> Gradient | None:
    """Return the pieces of gradients that all are of pieces along one axis, apart from each other; None if they are not."""
    axes = {gradient.pieces[0] for gradient in found if gradient.pieces}
    if len(axes) != 1 or any(gradient.pieces is None for gradient in found):
        return None
    pieces = sorted((piece for gradient in found if gradient.pieces for piece in gradient.pieces[1]), key=lambda p: p[:2])
    if any(a[1] > b[0] for a, b in pairwise(pieces)):
        return None
    return collapsed_pieces(axes.pop(), tuple(pieces))


def collapsed_pieces(axis: int, pieces: tuple[tuple[int, int, Gradient], ...]) -> Gradient:
    """Return the pieces as one gradient if they are of one kind: where there is no gradient, any kind is right."""
    kinds = {(gradient.kind, gradient.scale) for _, _, gradient in pieces}
    if len(kinds) == 1:
        first = pieces[0][2]
        met = frozenset().union(*(gradient.met for _, _, gradient in pieces))
        whole = Gradient(first.kind, first.scale, met, first.scaled_by)
        return evolve(whole, pieces=(axis, tuple((a, b, evolve(g, pieces=None)) for a, b, g in pieces)))
    return Gradient("whole", pieces=(axis, pieces))
