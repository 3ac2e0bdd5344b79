"""Operators that pick entries by number, or write to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..relation import Operand, OperatorCall, Relation, Shape
from .labels import (
    Labels,
    OperatorRule,
    aligned,
    axis_of,
    each,
    is_number,
    numbered,
    numbers_of,
    reasons,
    relate,
    replaced,
    shape_of,
    tensor,
)
from .pointwise import pointwise

_PICKED = "they are picked by number"
_WRITTEN = "they are written by number"


def _embedding(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "indices")))
    operands = {"weight": ("rows", "columns"), "indices": labels}
    return relate(call, operands, [(*labels, "columns")], whole={"rows": "rows are looked up by number"}, linear=["weight"])


def _index(call: OperatorCall) -> Relation:
    own = shape_of(call, "self")
    labels, given = numbered(len(own)), call.arguments["indices"]
    picked = _picked(given, own)
    if picked is None or len(_at(given, labels, picked)) != len(call.shapes[0]):
        return _all_whole(call, _PICKED)
    operands: list[Labels] = [()] * len(call.operands)
    operands[0] = labels
    for met in given:
        if isinstance(met, Operand):
            operands[met.number] = aligned(met.shape, picked)
    indexed = [labels[axis] for axis, met in enumerate(given) if isinstance(met, Operand)]
    result = _at(given, labels, picked)
    return Relation(tuple(operands), (result,), whole=reasons(indexed, _PICKED), linear=numbers(call, "self"))


def _index_put(call: OperatorCall) -> Relation:
    own = shape_of(call, "self")
    labels, given = numbered(len(own)), call.arguments["indices"]
    picked = _picked(given, own)
    if picked is None:
        return _all_whole(call, _WRITTEN)
    operands: list[Labels] = [()] * len(call.operands)
    operands[0] = labels
    for met in given:
        if isinstance(met, Operand):
            operands[met.number] = aligned(met.shape, picked)
    values = tensor(call, "values")
    if values is not None:
        operands[values.number] = aligned(values.shape, _at(given, labels, picked))
    indexed = [labels[axis] for axis, met in enumerate(given) if isinstance(met, Operand)]
    is_added = bool(call.arguments.get("accumulate"))
    written = {label for met in operands[1:] for label in met} & set(picked)
    whole = reasons(indexed, _WRITTEN) | ({} if is_added else reasons(written, _WRITTEN))
    summed = frozenset(written) if is_added else frozenset[str]()
    return Relation(tuple(operands), (labels,), summed=summed, whole=whole, linear=numbers(call, "self values"))


def _picked(given: Sequence[Any], own: Shape) -> Labels | None:
    """Return labels for the axes of index tensors that are broadcast together; None if there are more than axes."""
    shapes = [met.shape for met in given if isinstance(met, Operand)]
    return numbered(max(map(len, shapes), default=0), "picked") if len(given) <= len(own) else None


def _at(given: Sequence[Any], labels: Labels, picked: Labels) -> Labels:
    """Return labels for indexed entries: the indices' axes take the place of indexed axes, in front if these are apart."""
    axes = [axis for axis, met in enumerate(given) if isinstance(met, Operand)]
    if not axes:
        return labels
    kept = [axis for axis in range(len(labels)) if axis not in axes]
    at = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    return (*(labels[axis] for axis in kept if axis < at), *picked, *(labels[axis] for axis in kept if axis >= at))


def _all_whole(call: OperatorCall, reason: str) -> Relation:
    operands = tuple(numbered(len(operand.shape), f"operand{operand.number}") for operand in call.operands)
    results = tuple(("",) * len(shape) for shape in call.shapes)
    return Relation(operands, results, whole=reasons((label for labels in operands for label in labels), reason))


def numbers(call: OperatorCall, *names: str) -> tuple[frozenset[int], ...]:
    """Return the numbers of the operands in each of several sets."""
    return tuple(numbers_of(call, some) for some in names)


def _index_select(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "self")))
    at = axis_of(call, len(labels))
    picked = ("picked",) if shape_of(call, "index") else ()
    operands = {"self": labels, "index": picked}
    result = replaced(labels, at, "picked" if picked else "") if labels else ()
    return relate(call, operands, [result], whole=reasons(labels[at : at + 1], _PICKED), linear=["self"])


def _index_add(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "self")))
    at = axis_of(call, len(labels))
    picked = ("picked",) if shape_of(call, "index") else ()
    written = replaced(labels, at, "picked" if picked else "") if labels else ()
    operands = {"self": labels, "index": picked, "source": written[: len(shape_of(call, "source"))]}
    whole = reasons(labels[at : at + 1], _WRITTEN)
    if call.name.startswith("index_add"):
        return relate(call, operands, [labels], summed=picked, whole=whole, linear=["self source"])
    return relate(call, operands, [labels], whole=whole | reasons(picked, _WRITTEN), linear=["self source"])


def _index_fill(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "self")))
    at = axis_of(call, len(labels))
    picked = ("picked",) * len(shape_of(call, "index"))
    whole = reasons((*labels[at : at + 1], *picked), _WRITTEN)
    value = call.arguments["value"]
    linear = ["self value"] if isinstance(value, Operand) or is_number(value, 0) else []
    return relate(call, {"self": labels, "index": picked}, [labels], whole=whole, linear=linear)


def _gather(call: OperatorCall) -> Relation:
    own, index = shape_of(call, "self"), shape_of(call, "index")
    labels, at = numbered(len(own)), axis_of(call, len(own))
    short = [axis for axis in range(len(labels)) if axis != at and index[axis : axis + 1] != own[axis : axis + 1]]
    picked = replaced(labels, at, "picked") if labels else ()
    whole = reasons(labels[at : at + 1], _PICKED) | reasons(
        (labels[axis] for axis in short), "only the first of them are read"
    )
    return relate(
        call, {"self": labels, "index": picked[: len(index)]}, [picked[: len(index)]], whole=whole, linear=["self"]
    )


def _scatter(call: OperatorCall) -> Relation:
    own, index, source = (shape_of(call, name) for name in ("self", "index", "src"))
    labels, at = numbered(len(own)), axis_of(call, len(own))
    written = replaced(labels, at, "written") if labels else ()
    has_source = tensor(call, "src") is not None
    short = {axis for axis in range(len(labels)) if axis != at and index[axis : axis + 1] != own[axis : axis + 1]}
    if has_source:
        short |= {axis for axis in range(len(labels)) if index[axis : axis + 1] != source[axis : axis + 1]}
    is_added = _adds(call) and at not in short
    whole = reasons((labels[axis] for axis in (*short, at) if labels), _WRITTEN)
    whole |= {} if is_added else reasons(written[at : at + 1], _WRITTEN)
    operands = {"self": labels, "index": written[: len(index)], "src": written[: len(source)], "value": ()}
    return relate(
        call,
        operands,
        [labels],
        summed=written[at : at + 1] if is_added else (),
        whole=whole,
        linear=_linear_in_written(call),
    )


def _adds(call: OperatorCall) -> bool:
    if call.name.startswith("scatter_add"):
        return True
    adding = "sum" if call.name.startswith("scatter_reduce") else "add"
    includes_self = call.arguments.get("include_self", True)
    return call.arguments.get("reduce") == adding and includes_self and tensor(call, "src") is not None


def _linear_in_written(call: OperatorCall) -> list[str]:
    if call.arguments.get("reduce") is not None:
        return ["self src"] if _adds(call) else []
    value = call.arguments.get("value")
    return ["self src value"] if value is None or isinstance(value, Operand) or is_number(value, 0) else []


def _take_along(call: OperatorCall) -> Relation | None:
    if call.arguments.get("dim") is None:
        return _all_whole(call, _PICKED)
    own, index = shape_of(call, "self"), shape_of(call, "indices")
    labels, at = numbered(len(own)), axis_of(call, len(own))
    named = {
        "self": tuple(label if axis == at else "" if own[axis] == 1 else label for axis, label in enumerate(labels)),
        "indices": aligned(index, replaced(labels, at, "picked")),
    }
    result = aligned(call.shapes[0], replaced(labels, at, "picked"))
    return relate(call, named, [result], whole=reasons([labels[at]], _PICKED), linear=["self"])


def _take(call: OperatorCall) -> Relation:
    """Relate ``take``, which counts all entries in one."""
    labels = numbered(len(shape_of(call, "self")))
    picked = numbered(len(shape_of(call, "index")), "picked")
    return relate(call, {"self": labels, "index": picked}, [picked], whole=reasons(labels, _PICKED), linear=["self"])


def _masked_scatter(call: OperatorCall) -> Relation:
    return _all_whole(call, "the entries of a mask are counted")


def _one_hot(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "self")))
    whole = reasons(labels, "their largest is looked for") if call.arguments.get("num_classes", -1) < 0 else {}
    return relate(call, {"self": labels}, [(*labels, "")], whole=whole)


def _is_in(call: OperatorCall) -> Relation | None:
    if tensor(call, "test_elements") is None:
        return pointwise(call)
    labels, tested = numbered(len(shape_of(call, "elements"))), numbered(len(shape_of(call, "test_elements")), "tested")
    operands = {"elements": labels, "test_elements": tested}
    return relate(call, operands, [labels], whole=reasons(tested, "entries are looked for among them"))


def _bucket(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "self")))
    operands = {"self": labels, "boundaries": ("boundary",)}
    return relate(call, operands, [labels], whole={"boundary": "entries are sorted into them"})


def _search(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "self")))
    sequence = shape_of(call, "sorted_sequence")
    sorted_labels = ("sequence",) if len(sequence) == 1 else (*labels[:-1], "sequence")
    operands = {"self": labels, "sorted_sequence": sorted_labels, "sorter": sorted_labels}
    return relate(call, operands, [labels], whole={"sequence": "entries are sorted into them"})


def _draw(call: OperatorCall) -> Relation:
    labels = numbered(len(shape_of(call, "self")))
    return relate(call, {"self": labels}, [(*labels[:-1], "")], whole=reasons(labels[-1:], "entries are drawn among them"))


INDEXING: dict[str, OperatorRule] = {
    "embedding": _embedding,
    **each("index _unsafe_index", _index),
    **each("index_put _index_put_impl _unsafe_index_put", _index_put),
    "index_select": _index_select,
    **each("index_add index_copy", _index_add),
    "index_fill": _index_fill,
    "gather": _gather,
    **each("scatter scatter_add scatter_reduce", _scatter),
    "take_along_dim": _take_along,
    "take": _take,
    "masked_scatter": _masked_scatter,
    "one_hot": _one_hot,
    "isin": _is_in,
    "bucketize": _bucket,
    "searchsorted": _search,
    "multinomial": _draw,
}
