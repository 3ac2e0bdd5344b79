"""Operators that work entry by entry, with axes of one entry broadcast."""

from __future__ import annotations

from collections.abc import Callable

from ..relation import Filled, Operand, OperatorCall, Relation
from .labels import OperatorRule, aligned, all_numbers, broadcast, each, is_number, keeps_fractions, numbered, numbers_of

LinearSets = tuple[frozenset[int], ...]


def pointwise(call: OperatorCall) -> Relation | None:
    """Relate an operator that works entry by entry, and is not linear."""
    return _entry_by_entry(call, ())


def _entry_by_entry(call: OperatorCall, linear: LinearSets) -> Relation | None:
    shape = broadcast(operand.shape for operand in call.operands)
    if any(result != shape for result in call.shapes):
        return None
    labels = aligned(shape, numbered(len(shape)))
    return Relation(
        tuple(aligned(operand.shape, labels) for operand in call.operands), (labels,) * len(call.shapes), linear=linear
    )


def _linear(sets: Callable[[OperatorCall], LinearSets]) -> OperatorRule:
    return lambda call: _entry_by_entry(call, sets(call))


def _in_first(_call: OperatorCall) -> LinearSets:
    return (frozenset({0}),)


def _in_all(call: OperatorCall) -> LinearSets:
    return (all_numbers(call),)


def _added(call: OperatorCall) -> LinearSets:
    others = [call.arguments[name] for name in ("self", "other") if name in call.arguments]
    return _in_all(call) if all(isinstance(other, Operand) or is_number(other, 0) for other in others) else ()


def _multiplied(call: OperatorCall) -> LinearSets:
    return tuple(frozenset({operand.number}) for operand in call.operands)


def _divided(call: OperatorCall) -> LinearSets:
    return _sets(call, "self") if call.arguments.get("rounding_mode") is None else ()


def _cast(call: OperatorCall) -> LinearSets:
    if "other" in call.arguments:  # its dtype is not known here
        return ()
    return _in_first(call) if keeps_fractions(call) else ()


def _where(call: OperatorCall) -> Relation | None:
    if "self" not in call.arguments:  # the numbers of those that are true
        return None
    chosen = [call.arguments["self"], call.arguments["other"]]
    is_linear = all(isinstance(met, Operand) or is_number(met, 0) for met in chosen)
    return _entry_by_entry(call, _sets(call, "self other") if is_linear else ())


def _masked(call: OperatorCall) -> LinearSets:
    value = call.arguments["value"]
    return _sets(call, "self value") if isinstance(value, Operand) or is_number(value, 0) else ()


def _with_product(call: OperatorCall) -> LinearSets:
    return _sets(call, "self tensor1", "self tensor2")


def _with_quotient(call: OperatorCall) -> LinearSets:
    return _sets(call, "self tensor1")


def _between(call: OperatorCall) -> LinearSets:
    return _sets(call, "self end")


def _to_power(call: OperatorCall) -> LinearSets:
    return _sets(call, "self") if is_number(call.arguments.get("exponent"), 1) else ()


def _overwritten(call: OperatorCall) -> LinearSets:
    return _sets(call, "src", "self src")


def _fill(call: OperatorCall) -> LinearSets:
    value = call.arguments.get("value", 0)  # zero_ has none
    return (
        _sets(call, "value", "self value") if isinstance(value, Operand) else _in_first(call) if is_number(value, 0) else ()
    )


def _sets(call: OperatorCall, *names: str) -> LinearSets:
    return tuple(numbers for some in names if (numbers := numbers_of(call, some)))


def _filled(call: OperatorCall) -> Filled | None:
    return None if isinstance(call.arguments.get("fill_value"), Operand) else Filled()


def _rule_of_dropout(call: OperatorCall) -> Relation | None:
    return _entry_by_entry(call, _in_first(call) if len(call.shapes) == 1 else ())


def _prelu(call: OperatorCall) -> Relation:
    first, weight = call.operands
    labels = numbered(len(first.shape))
    slope = labels[1] if len(labels) > 1 else labels[0] if labels else ""
    return Relation((labels, ("" if weight.shape == (1,) else slope,) * len(weight.shape)), (labels,))


POINTWISE: dict[str, OperatorRule] = {
    **each("neg negative positive alias alias_copy detach clone contiguous lift_fresh", _linear(_in_first)),
    **each("lift_fresh_copy real imag conj _conj resolve_conj resolve_neg", _linear(_in_first)),
    **each("conj_physical _conj_physical deg2rad rad2deg", _linear(_in_first)),
    **each("_to_copy to type_as", _linear(_cast)),
    **each("dropout native_dropout feature_dropout", _rule_of_dropout),
    **each("add sub rsub subtract complex", _linear(_added)),
    **each("mul multiply", _linear(_multiplied)),
    **each("div divide true_divide", _linear(_divided)),
    **each("fill zero", _linear(_fill)),
    "where": _where,
    "masked_fill": _linear(_masked),
    "addcmul": _linear(_with_product),
    "addcdiv": _linear(_with_quotient),
    "lerp": _linear(_between),
    "pow": _linear(_to_power),
    "copy": _linear(_overwritten),
    **each("zeros_like ones_like full_like empty_like new_zeros new_ones new_full", _filled),
    **each("new_empty new_empty_strided zeros ones full empty empty_strided", _filled),
    **each("empty_permuted scalar_tensor", _filled),
    **each("bernoulli normal uniform exponential random log_normal cauchy geometric", pointwise),
    **each("rand_like randn_like randint_like alpha_dropout feature_alpha_dropout poisson", pointwise),
    **each("__and__ __or__ __xor__ __iand__ __ior__ __ixor__ __lshift__ __rshift__", pointwise),
    **each("hardswish floor_divide polar isclose absolute gelu silu", pointwise),
    **each("log_sigmoid special_expit greater greater_equal less less_equal", pointwise),
    **each("not_equal selu rrelu_with_noise rrelu", pointwise),
    **each("log_sigmoid_forward _assert_async _assert_tensor_metadata", pointwise),
    "_prelu_kernel": pointwise,
    "prelu": _prelu,
}
"""Operators that work entry by entry which torch does not call pointwise, or which are linear."""
