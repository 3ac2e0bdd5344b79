"""Operators that reduce axes, or run along one."""

from __future__ import annotations

from ..relation import Operand, OperatorCall, Relation
from .labels import Labels, OperatorRule, axes_of, axis_of, each, keeps_fractions, numbered, reasons, replaced, without
from .pointwise import pointwise


def _reduced(call: OperatorCall) -> tuple[Labels, set[int], Labels]:
    """Return the labels of the operand, the axes that are reduced, and the labels of the result."""
    labels = numbered(len(call.operands[0].shape))
    gone = set(axes_of(call, len(labels)))
    return labels, gone, without(labels, gone, kept=bool(call.arguments.get("keepdim")))


def _sum(call: OperatorCall) -> Relation:
    labels, gone, result = _reduced(call)
    axes = [labels[axis] for axis in gone if labels]
    if "bool" in str(call.arguments.get("dtype")):
        return Relation((labels,), (result,), whole=reasons(axes, "all of them are summed as bool"))
    return Relation((labels,), (result,), summed=frozenset(axes), linear=_linear(call))


def _linear(call: OperatorCall) -> tuple[frozenset[int], ...]:
    return (frozenset({0}),) if keeps_fractions(call) else ()


def _mean(call: OperatorCall) -> Relation:
    labels, gone, result = _reduced(call)
    axes = [labels[axis] for axis in gone if labels]
    return Relation((labels,), (result,), averaged=frozenset(axes), linear=_linear(call))


def _reduce(call: OperatorCall) -> Relation | None:
    if isinstance(call.arguments.get("other"), Operand):  # max and min of two tensors
        return pointwise(call)
    labels, gone, result = _reduced(call)
    reason = f"{call.name} is taken over them"
    whole = reasons((labels[axis] for axis in gone if labels), reason)
    return Relation((labels,), (result,) * len(call.shapes), whole=whole)


def _run(call: OperatorCall) -> Relation:
    labels = numbered(len(call.operands[0].shape))
    whole = reasons(labels[axis_of(call, len(labels)) :][:1], f"{call.name} runs along them")
    linear = _linear(call) if call.name in {"cumsum", "cumsum_"} else ()
    return Relation((labels,), (labels,) * len(call.shapes), whole=whole, linear=linear)


def _sorted(call: OperatorCall) -> Relation:
    labels = numbered(len(call.operands[0].shape))
    at = axis_of(call, len(labels)) if "dim" in call.arguments else 0
    whole = reasons(labels[at : at + 1], f"{call.name} compares them with each other")
    result = replaced(labels, at) if labels else ()
    return Relation((labels,), (result,) * len(call.shapes), whole=whole)


def _picked(call: OperatorCall) -> Relation:
    """Relate ``kthvalue``, ``median`` and ``mode``: one entry of an axis, and its number."""
    labels, gone, result = _reduced(call)
    whole = reasons((labels[axis] for axis in gone if labels), f"{call.name} compares them with each other")
    return Relation((labels,), (result,) * len(call.shapes), whole=whole)


def _softmax(call: OperatorCall) -> Relation:
    labels = numbered(len(call.operands[0].shape))
    reason = f"{call.name.strip('_')} is taken over them"
    return Relation((labels,), (labels,), whole=reasons(labels[axis_of(call, len(labels)) :][:1], reason))


def _gated(call: OperatorCall) -> Relation:
    """Relate ``glu``: the first half of an axis, times the sigmoid of the second."""
    labels = numbered(len(call.operands[0].shape))
    at = axis_of(call, len(labels))
    whole = reasons([labels[at]], "their first half is multiplied with the second")
    return Relation((labels,), (replaced(labels, at),), whole=whole)


def _counted(call: OperatorCall) -> Relation:
    """Relate ``histc`` and ``bincount``: a result whose entries come from all entries."""
    operands = tuple(numbered(len(operand.shape), f"operand{operand.number}") for operand in call.operands)
    whole = reasons((label for labels in operands for label in labels), f"{call.name} is taken over them")
    return Relation(operands, tuple(("",) * len(shape) for shape in call.shapes), whole=whole)


REDUCTIONS: dict[str, OperatorRule] = {
    "sum": _sum,
    "mean": _mean,
    **each("max min amax amin aminmax all any argmax argmin prod var std var_mean std_mean logsumexp", _reduce),
    **each("linalg_vector_norm norm count_nonzero nansum _is_all_true _is_any_true", _reduce),
    **each("cumsum cumprod logcumsumexp cummax cummin", _run),
    **each("topk sort argsort msort", _sorted),
    **each("kthvalue median nanmedian mode", _picked),
    **each("softmax log_softmax _softmax _log_softmax _safe_softmax special_softmax", _softmax),
    **each("special_log_softmax", _softmax),
    "glu": _gated,
    **each("histc bincount dist trace", _counted),
}
