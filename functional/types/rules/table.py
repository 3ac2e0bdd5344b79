"""The table of operators, and what is known of a call by it."""

from __future__ import annotations

from ..relation import OperatorCall, Relation, Rule
from .attention import ATTENTION
from .batched import BATCHED
from .convolutions import CONVOLUTIONS
from .indexing import INDEXING
from .labels import OperatorRule
from .losses import LOSSES
from .normalisation import NORMS
from .pointwise import POINTWISE, pointwise
from .products import PRODUCTS
from .reductions import REDUCTIONS
from .shapes import SHAPES

RULES: dict[str, OperatorRule] = {
    **POINTWISE,
    **PRODUCTS,
    **REDUCTIONS,
    **NORMS,
    **ATTENTION,
    **SHAPES,
    **INDEXING,
    **CONVOLUTIONS,
    **LOSSES,
    **BATCHED,
}
"""Operators by name, without overload; those that work in place go by the name of those that do not."""


def rule_of(call: OperatorCall) -> Rule | None:
    """Return how a call relates the axes of its operands and results; None where nothing is known of the operator."""
    rule = RULES.get(call.name) or RULES.get(call.name.removesuffix("_"))
    if rule is None:
        return pointwise(call) if call.is_pointwise and call.name not in _NO_TENSOR else None
    made = rule(call)
    return None if isinstance(made, Relation) and not _fits(call, made) else made


def _fits(call: OperatorCall, made: Relation) -> bool:
    """Tell whether a relation has a label for each axis: not so for some forms of operators on single numbers."""
    shapes = (*(operand.shape for operand in call.operands), *call.shapes)
    labels = (*made.operands, *made.results)
    return list(map(len, shapes)) == list(map(len, labels)) and len(made.operands) == len(call.operands)


_NO_TENSOR = frozenset({"equal"})
"""Operators that torch calls pointwise, but which give one answer for all entries."""
