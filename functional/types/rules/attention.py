"""Scaled dot-product attention, and its fused forms."""

from __future__ import annotations

from attrs import evolve

from ..relation import OperatorCall, Relation, RepeatedEach, Shape
from .labels import Labels, OperatorRule, aligned, numbered, relate, shape_of, tensor


def _attention(call: OperatorCall) -> Relation | None:
    query, key, value = (shape_of(call, name) for name in ("query", "key", "value"))
    batch = numbered(len(call.shapes[0]) - 2, "batch")
    repeated = _repeated(query, key, value)
    if repeated is None:
        return None
    labels_of_key = (*aligned(_heads(key, repeated.get("key")), batch), "keys", "features")
    labels_of_value = (*aligned(_heads(value, repeated.get("value")), batch), "keys", "outputs")
    operands = {
        "query": (*aligned(query[:-2], batch), "queries", "features"),
        "key": labels_of_key,
        "value": labels_of_value,
    }
    for name in ("attn_mask", "attn_bias"):
        operands[name] = aligned(shape_of(call, name), (*batch, "queries", "keys"))
    whole = {"features": "queries and keys are multiplied over them", "keys": "softmax is taken over them"}
    if call.arguments.get("is_causal"):
        whole["queries"] = "a causal mask counts them from the first"
    if call.name != "scaled_dot_product_attention":
        whole["outputs"] = "the fused form takes heads of one size"
    result = (*batch, "queries", "outputs")
    results = [result, *(_statistics(shape, (*call.shapes[0][:-1],), result[:-1]) for shape in call.shapes[1:])]
    linear = ["value"] if len(call.shapes) == 1 else []
    made = relate(call, operands, results, whole=whole, linear=linear)
    return _with_repeated(call, made, repeated)


def _repeated(query: Shape, key: Shape, value: Shape) -> dict[str, RepeatedEach] | None:
    """Return how often each head of keys and values is used, where several heads of queries share it."""
    found: dict[str, RepeatedEach] = {}
    for name, shape in (("key", key), ("value", value)):
        if query[-3:-2] != shape[-3:-2] and shape[-3] > 1:
            if query[-3] % shape[-3]:
                return None
            found[name] = RepeatedEach(len(shape) - 3, query[-3] // shape[-3])
    return found


def _heads(shape: Shape, repeated: RepeatedEach | None) -> Shape:
    return shape[:-2] if repeated is None else (*shape[:-3], shape[-3] * repeated.num)


def _with_repeated(call: OperatorCall, made: Relation, repeated: dict[str, RepeatedEach]) -> Relation:
    found = [(operand.number, how) for name, how in repeated.items() if (operand := tensor(call, name)) is not None]
    return evolve(made, repeated=tuple(found))


def _statistics(shape: Shape, expected: Shape, labels: Labels) -> Labels:
    """Return labels for what fused forms keep for the backward pass: some of it has a number for each query."""
    num_batch = len(labels) - 1
    if shape[:num_batch] != expected[:num_batch] or len(shape) < len(labels):
        return ("",) * len(shape)
    is_each = shape[num_batch] == expected[num_batch]
    return (*labels[:num_batch], labels[-1] if is_each else "", *("",) * (len(shape) - len(labels)))


ATTENTION: dict[str, OperatorRule] = dict.fromkeys(
    (
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    _attention,
)
