"""Norms over features, groups of channels, and samples."""

from __future__ import annotations

from ..relation import OperatorCall, Relation
from .labels import Labels, OperatorRule, aligned, axes_of, each, numbered, reasons, relate, shape_of, without


def _over_features(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "input")))
    num = len(call.arguments["normalized_shape"])
    features = labels[len(labels) - num :]
    statistics = (*labels[: len(labels) - num], *("",) * num)
    operands = {"input": labels, "weight": features, "bias": features}
    results = [labels, statistics, statistics][: len(call.shapes)]
    return relate(call, operands, results, whole=reasons(features, "a norm is taken over them"))


def _over_groups(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "input")))
    statistics = (labels[0], "") if len(call.shapes) > 1 else ()
    channel = labels[1:2]
    operands = {"input": labels, "weight": channel, "bias": channel}
    results = [labels, statistics, statistics][: len(call.shapes)]
    return relate(call, operands, results, whole=reasons(labels[1:], "a norm is taken over groups of them"))


def _over_samples(call: OperatorCall) -> Relation:
    shape = shape_of(call, "input")
    labels = numbered(len(shape))
    channel = labels[1:2]
    over = (labels[0], *labels[2:]) if _is_training(call) else ()
    operands = {"input": labels, **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), channel)}
    results = [labels, *(channel if shape == (call.shapes[0][1],) else ("",) * len(shape) for shape in call.shapes[1:])]
    return relate(call, operands, results, whole=reasons(over, "a norm is taken over all samples"))


def _is_training(call: OperatorCall) -> bool:
    is_training = call.arguments.get("training", call.name == "_batch_norm_with_update")
    return bool(is_training) or not shape_of(call, "running_mean")  # also in evaluation if there are no running statistics


def _over_places(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "input")))
    channel = labels[1:2]
    over = labels[2:] if call.arguments["use_input_stats"] else ()
    operands = {"input": labels, **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), channel)}
    whole = reasons(over, "a norm is taken over them")
    if shape_of(call, "running_mean") and call.arguments["use_input_stats"]:
        whole |= reasons(labels[:1], "running statistics are taken over all samples")
    written = (channel,) * (len(call.shapes) - 1)  # running statistics
    return relate(call, operands, [labels, *written], whole=whole)


def _weight_norm(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "v")))
    kept = call.arguments["dim"] % len(labels)
    norms: Labels = tuple(label if axis == kept else "" for axis, label in enumerate(labels))
    operands = {"v": labels, "g": aligned(shape_of(call, "g"), labels)}
    whole = reasons(without(labels, [kept]), "a norm is taken over them")
    return relate(call, operands, [labels, norms][: len(call.shapes)], whole=whole)


def _over_axes(call: OperatorCall) -> Relation:
    """Relate ``cosine_similarity``: products and norms over an axis of two tensors that are broadcast."""
    rank = max(len(operand.shape) for operand in call.operands)
    labels = numbered(rank)
    (gone,) = axes_of(call, rank)
    operands = {name: aligned(shape_of(call, name), labels) for name in ("x1", "x2")}
    whole = reasons(labels[gone : gone + 1], f"{call.name} is taken over them")
    return relate(call, operands, [without(labels, [gone])], whole=whole)


NORMS: dict[str, OperatorRule] = {
    **each("layer_norm native_layer_norm rms_norm _fused_rms_norm", _over_features),
    **each("group_norm native_group_norm", _over_groups),
    **each("batch_norm native_batch_norm _native_batch_norm_legit", _over_samples),
    **each("_native_batch_norm_legit_no_training _batch_norm_with_update", _over_samples),
    "instance_norm": _over_places,
    "_weight_norm_interface": _weight_norm,
    "cosine_similarity": _over_axes,
}
