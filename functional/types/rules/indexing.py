"""Operators that pick entries by number, or write to them."""

from __future__ import annotations

import math

from attrs import frozen

from ..relation import Operand, OperatorCall, Relation, Shape
from .labels import (
    Labels,
    OperatorRule,
    aligned,
    axis_of,
    broadcast,
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
    at = _indexed(call)
    if at is None or (
        not at.has_mask and broadcast(at.shapes) != tuple(call.shapes[0][at.first : at.first + len(at.picked)])
    ):
        return _all_whole(call, _PICKED)
    result = (*at.before, *(("",) if at.has_mask else at.picked), *at.after)
    whole = reasons((*at.taken, *(at.picked if at.has_mask else ())), _PICKED)
    return Relation(at.operands, (result,), whole=whole, linear=(numbers_of(call, "self"),))


def _index_put(call: OperatorCall) -> Relation:
    at, values = _indexed(call), tensor(call, "values")
    if at is None or values is None:
        return _all_whole(call, _WRITTEN)
    operands, labels = list(at.operands), at.operands[0]
    linear = (numbers_of(call, "self values"),)
    if at.has_mask and not at.picked and math.prod(values.shape) == 1:  # one value wherever a mask says so
        operands[values.number] = ("",) * len(values.shape)
        return Relation(tuple(operands), (labels,), linear=linear)
    written = (*at.before, *(("written",) if at.has_mask else at.picked), *at.after)
    operands[values.number] = aligned(values.shape, written)
    used = {label for met in operands[1:] for label in met} & {*at.picked, "written"}
    is_added = bool(call.arguments.get("accumulate")) and not at.has_mask and used <= set(operands[values.number])
    whole = reasons((*at.taken, *(() if is_added else used)), _WRITTEN)
    return Relation(tuple(operands), (labels,), summed=frozenset(used if is_added else ()), whole=whole, linear=linear)


@frozen
class _Indexed:
    """How a tensor is indexed.

    Args:
        operands: Labels for the tensor, the indices, and none for anything else.
        taken: Labels of the axes that are indexed.
        picked: Labels of the axes of the indices, broadcast together; none for those of masks.
        before: Labels of the axes that are kept before the place where indexed entries go.
        after: And behind it.
        shapes: Shapes of the indices that are no masks.
        has_mask: Whether there is a mask among them.
    """

    operands: tuple[Labels, ...]
    taken: Labels
    picked: Labels
    before: Labels
    after: Labels
    shapes: tuple[Shape, ...]
    has_mask: bool

    @property
    def first(self) -> int:
        """The axis where indexed entries go."""
        return len(self.before)


def _indexed(call: OperatorCall) -> _Indexed | None:
    own = shape_of(call, "self")
    labels, given = numbered(len(own)), call.arguments["indices"]
    indices = [met for met in given if isinstance(met, Operand)]
    shapes = tuple(met.shape for met in indices if not met.is_mask)
    picked = numbered(max(map(len, shapes), default=0), "picked")
    operands: list[Labels] = [()] * len(call.operands)
    operands[0] = labels
    taken: list[int] = []
    axis = 0
    for met in given:
        num = len(met.shape) if isinstance(met, Operand) and met.is_mask else 1
        if isinstance(met, Operand):
            taken += range(axis, axis + num)
            operands[met.number] = labels[axis : axis + num] if met.is_mask else aligned(met.shape, picked)
        axis += num
    if axis > len(own) or not indices:
        return None
    # in the place of the first where they stand side by side, and in front where they are apart
    first = taken[0] if taken and taken == list(range(taken[0], taken[-1] + 1)) else 0
    kept = [at for at in range(len(labels)) if at not in taken]
    return _Indexed(
        tuple(operands),
        tuple(labels[at] for at in taken),
        picked,
        tuple(labels[at] for at in kept if at < first),
        tuple(labels[at] for at in kept if at >= first),
        shapes,
        any(met.is_mask for met in indices),
    )


def _all_whole(call: OperatorCall, reason: str) -> Relation:
    operands = tuple(numbered(len(operand.shape), f"operand{operand.number}") for operand in call.operands)
    results = tuple(("",) * len(shape) for shape in call.shapes)
    return Relation(operands, results, whole=reasons((label for labels in operands for label in labels), reason))


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
    labels, apart = numbered(len(own)), _apart(call, own, index)
    picked = tuple(label if axis in apart else f"picked{axis}" for axis, label in enumerate(labels))
    free = {*(labels[axis] for axis in apart), f"picked{axis_of(call, len(own))}"}
    return relate(
        call, {"self": labels, "index": picked}, [picked], whole=reasons({*labels, *picked} - free, _PICKED), linear=["self"]
    )


def _scatter(call: OperatorCall) -> Relation:
    own, index, source = (shape_of(call, name) for name in ("self", "index", "src"))
    has_source = tensor(call, "src") is not None
    labels, apart = numbered(len(own)), _apart(call, own, index, *([source] if has_source else []))
    written = tuple(label if axis in apart else f"written{axis}" for axis, label in enumerate(labels))
    read = tuple(label if axis in apart or index == source else f"read{axis}" for axis, label in enumerate(written))
    operands = {"self": labels, "index": written[: len(index)], "src": read[: len(source)]}
    at = axis_of(call, len(own))
    added = set(written[at : at + 1]) if _adds(call) and index == source else set[str]()
    whole = reasons({*labels, *written, *read} - {labels[axis] for axis in apart} - added, _WRITTEN)
    return relate(call, operands, [labels], summed=added, whole=whole, linear=_linear_in_written(call))


def _apart(call: OperatorCall, own: Shape, *others: Shape) -> set[int]:
    """Return the axes along which all have as many entries, and none are picked by number."""
    at = axis_of(call, len(own))
    sizes = enumerate(zip(own, *others, strict=True)) if all(len(other) == len(own) for other in others) else ()
    return {axis for axis, met in sizes if axis != at and len(set(met)) == 1}


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
    **each("index_put _unsafe_index_put", _index_put),
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
