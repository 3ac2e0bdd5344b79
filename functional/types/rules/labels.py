"""Labels for the axes of a call's tensors, and relations made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

from ..relation import Label, Operand, OperatorCall, Relation, Rule, Shape

OperatorRule = Callable[[OperatorCall], Rule | None]
"""What is known of a call of an operator; None where nothing is."""

Labels = tuple[Label, ...]


def each(names: str, rule: OperatorRule) -> dict[str, OperatorRule]:
    """Return entries of the table for operators with the same rule: their names, with spaces between."""
    return dict.fromkeys(names.split(), rule)


def numbered(rank: int, letter: str = "x") -> Labels:
    """Return a label for each axis of a tensor."""
    return tuple(f"{letter}{axis}" for axis in range(rank))


def aligned(shape: Shape, labels: Labels) -> Labels:
    """Return labels for an operand that is broadcast: aligned from the last axis, none for axes of one entry."""
    met = labels[len(labels) - len(shape) :] if shape else ()
    return tuple("" if size == 1 else label for size, label in zip(shape, met, strict=True))


def broadcast(shapes: Iterable[Shape]) -> Shape:
    """Return the shape of tensors that are broadcast together."""
    sizes = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
    return tuple(next((size for size in met if size != 1), 1) for met in sizes)[::-1]


def relate(
    call: OperatorCall,
    operands: Mapping[str, Labels],
    results: Iterable[Labels],
    *,
    summed: Iterable[Label] = (),
    averaged: Iterable[Label] = (),
    whole: Mapping[Label, str] | None = None,
    linear: Iterable[str] = (),
) -> Relation:
    """Relate the operands of a call to its results.

    Args:
        call: The call.
        operands: Labels of the axes of its operands, by names of arguments; arguments that are no tensors are passed over.
        results: Labels of the axes of its results.
        summed: As in :class:`Relation`.
        averaged: As in :class:`Relation`.
        whole: As in :class:`Relation`.
        linear: Sets of operands in which it is linear together: names of arguments, with spaces between.
    """
    labels: list[Labels] = [()] * len(call.operands)
    for name, named in operands.items():
        if (operand := tensor(call, name)) is not None:
            labels[operand.number] = named
    return Relation(
        tuple(labels),
        tuple(results),
        frozenset(summed) - {""},
        frozenset(averaged) - {""},
        {label: reason for label, reason in (whole or {}).items() if label},
        tuple(numbers for names in linear if (numbers := numbers_of(call, names))),
    )


def tensor(call: OperatorCall, name: str) -> Operand | None:
    """Return an argument of a call if it is a tensor."""
    argument = call.arguments.get(name)
    return argument if isinstance(argument, Operand) else None


def shape_of(call: OperatorCall, name: str) -> Shape:
    """Return the shape of an argument that is a tensor; that of a single number for any other."""
    operand = tensor(call, name)
    return operand.shape if operand is not None else ()


def numbers_of(call: OperatorCall, names: str) -> frozenset[int]:
    """Return the numbers of the operands among some arguments."""
    return frozenset(operand.number for name in names.split() if (operand := tensor(call, name)) is not None)


def reasons(labels: Iterable[Label], reason: str) -> dict[Label, str]:
    """Return one reason for each of several labels."""
    return dict.fromkeys(labels, reason)


def all_numbers(call: OperatorCall) -> frozenset[int]:
    """Return the numbers of all operands."""
    return frozenset(range(len(call.operands)))


def axis_of(call: OperatorCall, rank: int, name: str = "dim") -> int:
    """Return an axis among the arguments, counted from 0."""
    return call.arguments[name] % max(rank, 1)


def axes_of(call: OperatorCall, rank: int, name: str = "dim") -> list[int]:
    """Return axes among the arguments, counted from 0; all axes where none are given."""
    given = call.arguments.get(name)
    if given is None or given == []:
        return list(range(rank))
    return [axis % max(rank, 1) for axis in (given if isinstance(given, Sequence) else [given])]


def without(labels: Labels, axes: Iterable[int], *, kept: bool = False) -> Labels:
    """Return the labels of a tensor whose axes are gone, or are kept with one entry each."""
    gone = set(axes)
    if kept:
        return tuple("" if axis in gone else label for axis, label in enumerate(labels))
    return tuple(label for axis, label in enumerate(labels) if axis not in gone)


def replaced(labels: Labels, axis: int, label: Label = "") -> Labels:
    """Return labels with another one for an axis."""
    return (*labels[:axis], label, *labels[axis + 1 :])


def keeps_fractions(call: OperatorCall) -> bool:
    """Tell whether a call gives numbers with fractions, or those of its operand: a cast to integers is not linear."""
    dtype = call.arguments.get("dtype")
    return dtype is None or "float" in str(dtype) or "complex" in str(dtype)


def is_number(argument: object, number: float) -> bool:
    """Return whether an argument is a certain number."""
    return isinstance(argument, (int, float, complex)) and argument == number
