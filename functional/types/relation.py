"""How an operator relates the axes of its operands and of its results: what each rule of the table says.

Labels stand for axes, as letters do in an einsum: axes with the same label are worked on entry by entry, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen
from frozendict import frozendict

Shape = tuple[int, ...]

Label = str
"""Name of an axis, ``""`` for an axis that cannot be split: of a single entry that is broadcast, or made in the operator."""


@frozen
class Operand:
    """A tensor among the arguments of a call.

    Args:
        number: Its place among the tensors of the call, from 0.
        shape: Its shape.
        is_mask: Whether its entries are true or false.
    """

    number: int
    shape: Shape
    is_mask: bool = False


@frozen
class OperatorCall:
    """A call of an operator.

    Args:
        name: The operator, without its overload: ``add``, ``softmax``, ``index_put_``.
        arguments: Its arguments by name, with defaults, tensors as :class:`Operand`, also in lists.
        operands: Its tensors, in the order of its arguments.
        shapes: Shapes of its results.
        is_pointwise: Whether torch says that it works entry by entry.
    """

    name: str
    arguments: Mapping[str, Any]
    operands: tuple[Operand, ...]
    shapes: tuple[Shape, ...]
    is_pointwise: bool = False


def _frozen(reasons: Mapping[Label, str]) -> Mapping[Label, str]:
    return frozendict(reasons)


@frozen
class Relation:
    """An operator whose axes correspond.

    Parts of axes with the same label give parts of the result. Operands that lack the label, or have a single entry there,
    are whole. A result without the label of a split axis, over which the operator does not sum, is the same for all parts.

    Args:
        operands: For each operand, the label of each axis.
        results: For each result, the label of each axis.
        summed: Labels of axes over which it sums: parts give summands. Where operands with the label are in a set of
            ``linear``, operands of the set without the label must be summands themselves, as the bias that ``addmm`` adds.
        averaged: Labels of axes over which it takes the mean: parts give summands of a multiple.
        whole: Labels of axes of which it needs all entries, each with the reason, as ``softmax is taken over them``.
        linear: Sets of operands in which it is linear together, if the rest is fixed: summands of these give a summand.
            ``add`` has {0, 1}, ``mul`` has {0} and {1}, ``softmax`` has none.
        repeated: Numbers of operands of which the labels speak after each entry of an axis is repeated: heads of keys that
            several heads of queries share.
    """

    operands: tuple[tuple[Label, ...], ...]
    results: tuple[tuple[Label, ...], ...]
    summed: frozenset[Label] = frozenset()
    averaged: frozenset[Label] = frozenset()
    whole: Mapping[Label, str] = field(default=frozendict(), converter=_frozen)
    linear: tuple[frozenset[int], ...] = ()
    repeated: tuple[tuple[int, RepeatedEach], ...] = ()


@frozen
class Reshaped:
    """The entries of the first operand, in their order, in the shape of the result. Linear."""


@frozen
class Taken:
    """Consecutive entries of an axis of the first operand, for each result. Linear.

    Args:
        axis: The axis.
        ranges: Start and stop for each result.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]


@frozen
class Strided:
    """Every so many entries of an axis of the first operand. Linear.

    Args:
        axis: The axis.
        start: The first.
        step: From each to the next.
    """

    axis: int
    start: int
    step: int


@frozen
class Joined:
    """All operands one after another along an axis. Linear in all together.

    Operands of shape [0] are left out where others have more axes.

    Args:
        axis: The axis.
    """

    axis: int


@frozen
class Widened:
    """The first operand, broadcast to the shape of the result.

    All entries are equal along new axes, and along axes that had a single entry.
    """


@frozen
class Tiled:
    """The first operand, repeated as a whole along each axis. Linear.

    Args:
        repeats: How often, for each axis of the result.
    """

    repeats: tuple[int, ...]


@frozen
class RepeatedEach:
    """Each entry of an axis of the first operand several times in a row. Linear.

    Args:
        axis: The axis.
        num: How often.
    """

    axis: int
    num: int


@frozen
class Filled:
    """New memory in which all entries are equal, whatever its sizes are."""


Rule = Relation | Reshaped | Taken | Strided | Joined | Widened | Tiled | RepeatedEach | Filled
"""What is known of a call."""
