"""What the ranks along ``tensor`` hold of a value that the whole model computes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from attrs import field, frozen

from ...specs.equality import ActivationType, TypeKind
from .axes import Axes, Axis, Whole, equal, local_size, parts_in, size_of, whole
from .axis_text import text
from .relation import Shape

Kind = Literal["whole", "parts", "summand", "rows", "unknown"]


@frozen
class Held:
    """What the ranks hold of a value.

    Args:
        kind: ``whole`` (the same on all), ``parts`` (entries along one axis), ``summand`` (the value is their sum), ``rows``
            (numbers of rows, counted from each rank's first row), or ``unknown``.
        axes: How each axis is shared out.
        scale: The ranks hold this multiple of it.
        lacks: Paths of biases that are yet to be added.
        unmasked: How many of the first axes count the tokens whose rows a rank does not have, and which are yet to be set to
            zero; 0 if there are none.
        fill: The number that all entries are, ``nan`` before any is written; None if they differ, or nobody knows.
        is_drawn: Whether entries are random numbers, drawn by each rank for itself.
        padding: The number at entries that are padding.
        origin: Where ``scale``, ``lacks`` or ``unmasked`` come from: a module; why it is unknown, until that is said.
        is_wrong: Whether it is unknown since no type would be right.
    """

    kind: Kind
    axes: Axes = ()
    scale: Fraction = Fraction(1)
    lacks: frozenset[str] = frozenset()
    unmasked: int = 0
    fill: float | None = None
    is_drawn: bool = False
    padding: Literal["", "zero", "lowest", "any"] = ""
    origin: str = field(default="", eq=False)
    is_wrong: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether every rank has the value of the whole model."""
        return self.kind == "whole" and not self.is_due and not self.is_drawn and all(map(is_all, self.axes))

    @property
    def is_due(self) -> bool:
        """Whether something is still to be done before it is what the whole model has."""
        return self.scale != 1 or bool(self.lacks or self.unmasked)

    @property
    def due(self) -> str:
        """What is still to be done, in words."""
        if self.scale != 1:
            return f"it is {self.scale} times what the whole model has, since {self.origin or 'a sum'} adds equal values"
        if self.lacks:
            return f"the bias {', '.join(sorted(self.lacks))} is not added"
        return "rows of other ranks are not set to zero" if self.unmasked else ""

    @property
    def split_axis(self) -> int | None:
        """The axis whose entries are shared out, if there is one."""
        return next((at for at, axis in enumerate(self.axes) if parts_in(axis) is not None), None)

    def local_shape(self, rank: int) -> Shape:
        """Return the shape of what a rank holds."""
        return tuple(local_size(axis, rank) for axis in self.axes)

    @property
    def shape(self) -> Shape:
        """The shape of the value in the whole model."""
        return tuple(map(size_of, self.axes))

    def activation_type(self, dtype: str) -> ActivationType:
        """Return the type in the form that plans show."""
        return ActivationType(dtype, tuple(map(text, self.axes)), _KINDS[self.kind])


_KINDS: Mapping[Kind, TypeKind] = {
    "whole": "whole",
    "parts": "split",
    "summand": "summand",
    "rows": "own",
    "unknown": "unknown",
}

UNKNOWN = Held("unknown")
"""What nobody could follow, as was said where it began."""


def lost(reason: str, *, is_wrong: bool = False) -> Held:
    """Return the type of a value that nobody could follow, or that is wrong, to be said where it is used."""
    return Held("unknown", origin=reason, is_wrong=is_wrong)


def whole_of(shape: Shape) -> Held:
    """Return the type of a value that is the same on all ranks."""
    return Held("whole", tuple(map(whole, shape)))


def is_all(axis: Axis) -> bool:
    """Tell whether every rank has all entries of an axis, in order."""
    return all(isinstance(f, Whole) or (parts_in((f,)) is None and size_of((f,)) == local_size((f,))) for f in axis)


def same(a: Held, b: Held) -> bool:
    """Tell whether two types are equal."""
    if (a.kind, a.scale, a.lacks, a.unmasked) != (b.kind, b.scale, b.lacks, b.unmasked):
        return False
    return len(a.axes) == len(b.axes) and all(equal(x, y) for x, y in zip(a.axes, b.axes, strict=True))
