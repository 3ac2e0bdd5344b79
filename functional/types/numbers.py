"""The numbers among the arguments of a call, on a rank and in the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import nan
from typing import Any

from .grouped import GROUPS
from .held import Held
from .relation import Filled, RepeatedEach, Reshaped, Rule, Strided, Taken, Tiled, Widened
from .tape import VIEWS, RecordedCall, ValueRef

_OWN_SIZES = {"native_group_norm": ("N", "C", "HxW")}
"""Arguments that repeat the sizes of an operand."""

_SIZES = (Reshaped, Taken, Strided, Widened, Tiled, RepeatedEach, Filled)
"""Rules of operators whose arguments are sizes."""

_COPIES = frozenset(
    {"detach", "_to_copy", "to", "expand", "unsqueeze", "squeeze", "transpose", "permute", "slice", "select"}
)

_MOST_RANKS = 1 << 20


def other_number(call: RecordedCall, other: RecordedCall, rule: Rule | None, *, own_rows: bool) -> tuple[Any, Any] | None:
    """Return an argument that is another number in the whole model, and no size that the rule follows."""
    for name, mine in call.arguments.items():
        theirs = other.arguments.get(name)
        if (own_rows and name == "padding_idx") or name in {
            "enable_gqa",
            GROUPS.get(call.name),
            *_OWN_SIZES.get(call.name, ()),
        }:
            continue
        if isinstance(rule, _SIZES) and name not in {"fill_value", "value", "dim"}:
            continue
        if found := _differing(mine, theirs):
            return found
    return None


def ratio_of(call: RecordedCall, numbers: tuple[Any, Any] | None) -> Fraction | None:
    """Return the multiple of the whole model's result, where a call multiplies by another number than there."""
    if (
        numbers is None
        or call.arguments.get("rounding_mode") is not None
        or call.name not in {"mul", "div", "mul_", "div_"}
        or not all(isinstance(n, (int, float)) and n for n in numbers)
    ):
        return None
    mine, theirs = (Fraction(number).limit_denominator(_MOST_RANKS) for number in numbers)
    ratio = mine / theirs if call.name.startswith("mul") else theirs / mine
    is_exact = float(mine) == numbers[0] and float(theirs) == numbers[1]
    is_of_ranks = ratio.numerator == 1 or ratio.denominator == 1
    return ratio if is_exact and is_of_ranks else None


def _differing(mine: Any, theirs: Any) -> tuple[Any, Any] | None:
    if isinstance(mine, ValueRef) or isinstance(theirs, ValueRef):
        return None
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(mine) == len(theirs):
        return next((found for a, b in zip(mine, theirs, strict=True) if (found := _differing(a, b))), None)
    return None if mine == theirs or mine != mine else (mine, theirs)  # noqa: PLR0124  not a number


def fill_of(call: RecordedCall) -> float | None:
    """Return the number with which an operator fills new memory: no number for memory that is to be written to first."""
    if call.name.startswith(("empty", "new_empty")):
        return nan
    if call.name.startswith(("zeros", "new_zeros", "zero")):
        return 0.0
    if call.name.startswith(("ones", "new_ones")):
        return 1.0
    value = call.arguments.get("fill_value", call.arguments.get("value"))
    return float(value) if isinstance(value, (int, float)) else None


def kept_fill(call: RecordedCall, operands: Sequence[Held]) -> float | None:
    """Return the number that all entries are, where an operator leaves the entries of its operand as they are."""
    return operands[0].fill if len(operands) == 1 and call.name in _COPIES | VIEWS else None
