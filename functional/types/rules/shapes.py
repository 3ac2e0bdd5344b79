"""Operators that change shapes, move entries, or take some of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from ..relation import Joined, OperatorCall, Relation, RepeatedEach, Reshaped, Rule, Strided, Taken, Tiled, Widened
from .labels import Labels, OperatorRule, aligned, all_numbers, axes_of, axis_of, each, numbered, reasons, replaced, without

_LINEAR = (frozenset({0}),)


def _own(call: OperatorCall) -> Labels:
    return numbered(len(call.operands[0].shape))


def _moved(call: OperatorCall, results: Iterable[Labels], whole: Iterable[str] = (), reason: str = "") -> Relation:
    """Relate an operator that gives entries of its first operand, or zero, at other places."""
    operands = [_own(call), *(("",) * len(operand.shape) for operand in call.operands[1:])]
    return Relation(tuple(operands), tuple(results), whole=reasons(whole, reason), linear=_LINEAR)


def _reshape(call: OperatorCall) -> Rule | None:
    return None if call.arguments.get("dtype") is not None else Reshaped()


def _widen(_call: OperatorCall) -> Rule:
    return Widened()


def _permute(call: OperatorCall) -> Rule:
    labels = _own(call)
    order = [axis % len(labels) for axis in call.arguments["dims"]]
    return _moved(call, [tuple(labels[axis] for axis in order)])


def _reverse_axes(call: OperatorCall) -> Rule:
    return _moved(call, [_own(call)[::-1]])


def _swap_last(call: OperatorCall) -> Rule:
    labels = _own(call)
    return _moved(call, [(*labels[:-2], *labels[:-3:-1])])


def _transpose(call: OperatorCall) -> Rule:
    labels = _own(call)
    first, second = ("axis0", "axis1") if "axis0" in call.arguments else ("dim0", "dim1")
    if not labels:
        return _moved(call, [labels])
    a, b = axis_of(call, len(labels), first), axis_of(call, len(labels), second)
    return _moved(call, [replaced(replaced(labels, a, labels[b]), b, labels[a])])


def _move_axes(call: OperatorCall) -> Rule:
    labels = _own(call)
    sources, targets = axes_of(call, len(labels), "source"), axes_of(call, len(labels), "destination")
    rest = iter(axis for axis in range(len(labels)) if axis not in sources)
    order = [sources[targets.index(at)] if at in targets else next(rest) for at in range(len(labels))]
    return _moved(call, [tuple(labels[axis] for axis in order)])


def _unsqueeze(call: OperatorCall) -> Rule:
    labels = _own(call)
    at = axis_of(call, len(labels) + 1)
    return _moved(call, [(*labels[:at], "", *labels[at:])])


def _squeeze(call: OperatorCall) -> Rule:
    shape, labels = call.operands[0].shape, _own(call)
    dims = [] if call.arguments.get("dim") == [] else axes_of(call, len(labels))
    return _moved(call, [without(labels, [axis for axis in dims if shape and shape[axis] == 1])])


def _take(call: OperatorCall) -> Rule | None:
    """Relate ``slice`` and ``narrow``."""
    shape, labels = call.operands[0].shape, _own(call)
    axis = axis_of(call, len(shape))
    step = call.arguments.get("step", 1)
    if step != 1:
        start, end = call.arguments.get("start") or 0, call.arguments.get("end")
        if 0 <= start < step and (end is None or end >= shape[axis]):
            return Strided(axis, start, step)
        return _moved(call, [replaced(labels, axis)], [labels[axis]], "every so many of them are taken")
    start = call.arguments.get("start") or 0
    if not isinstance(start, int):
        return None
    start = min(max(start + shape[axis] if start < 0 else start, 0), shape[axis])
    return Taken(axis, ((start, start + call.shapes[0][axis]),))


def _split(call: OperatorCall) -> Rule | None:
    shape = call.operands[0].shape
    axis = axis_of(call, len(shape))
    stops = list(accumulate(result[axis] for result in call.shapes))
    if not stops or stops[-1] != shape[axis]:
        return None
    return Taken(axis, tuple(zip([0, *stops[:-1]], stops, strict=True)))


def _pick(call: OperatorCall) -> Rule:
    labels = _own(call)
    at = axis_of(call, len(labels))
    return _moved(call, [without(labels, [at])] * len(call.shapes), [labels[at]], "single entries of them are picked")


def _cat(call: OperatorCall) -> Rule:
    return Joined(_joined_axis(call))


def _joined_axis(call: OperatorCall) -> int:
    return axis_of(call, len(call.shapes[0])) if "dim" in call.arguments else 0


def _stack(call: OperatorCall) -> Rule:
    labels = _own(call)
    at = axis_of(call, len(labels) + 1)
    operands = (labels,) * len(call.operands)
    return Relation(operands, ((*labels[:at], "", *labels[at:]),), linear=(all_numbers(call),))


def _repeat(call: OperatorCall) -> Rule:
    return Tiled(tuple(call.arguments["repeats"]))


def _tile(call: OperatorCall) -> Rule:
    repeats = tuple(call.arguments["dims"])
    return Tiled((*(1,) * (len(call.operands[0].shape) - len(repeats)), *repeats))


def _repeat_each(call: OperatorCall) -> Rule | None:
    num, shape = call.arguments.get("repeats"), call.operands[0].shape
    if not isinstance(num, int) or (call.arguments.get("dim") is None and len(shape) != 1):
        return None
    return RepeatedEach(axis_of(call, len(shape)) if call.arguments.get("dim") is not None else 0, num)


def _reorder(call: OperatorCall) -> Rule:
    """Relate ``flip`` and ``roll``: entries stay in their axes, but in another order."""
    labels = _own(call)
    axes = axes_of(call, len(labels), "dims") if call.name != "flip" or call.arguments["dims"] else []
    return _moved(call, [labels], [labels[axis] for axis in axes if labels], f"{call.name} moves them")


def _triangle(call: OperatorCall) -> Rule:
    labels = _own(call)
    return _moved(call, [labels], labels[-2:], "a triangle is taken of them")


def _pad(call: OperatorCall) -> Rule:
    labels, pad = _own(call), call.arguments["pad"] if "pad" in call.arguments else call.arguments["padding"]
    padded = {len(labels) - 1 - at // 2 for at, num in enumerate(pad) if num}
    made = _moved(call, [without(labels, padded, kept=True)], [labels[axis] for axis in padded], "they are padded")
    is_linear = call.arguments.get("mode", "constant") != "constant" or not call.arguments.get("value")
    return made if is_linear else Relation(made.operands, made.results, whole=made.whole)


def _windows(call: OperatorCall) -> Rule:
    labels = _own(call)
    at = axis_of(call, len(labels), "dimension")
    return _moved(call, [(*replaced(labels, at), "")], labels[at : at + 1], "windows are taken of them")


def _diagonal(call: OperatorCall) -> Rule:
    labels = _own(call)
    axes = [axis_of(call, len(labels), "dim1"), axis_of(call, len(labels), "dim2")]
    return _moved(call, [(*without(labels, axes), "")], [labels[axis] for axis in axes], "a diagonal is taken of them")


def _diagonal_embedding(call: OperatorCall) -> Rule:
    labels = _own(call)
    axes = sorted({axis_of(call, len(labels) + 1, "dim1"), axis_of(call, len(labels) + 1, "dim2")})
    result = list(labels[:-1])
    for axis in axes:
        result.insert(axis, "")
    return _moved(call, [tuple(result)], labels[-1:], "they are put on a diagonal")


def _pairs_as_complex(call: OperatorCall) -> Rule:
    labels = _own(call)
    return _moved(call, [labels[:-1]], labels[-1:], "they are a real and an imaginary part")


def _complex_as_pairs(call: OperatorCall) -> Rule:
    return _moved(call, [(*_own(call), "")])


def _channels_and_places(call: OperatorCall) -> Rule:
    """Relate operators that move entries between the axes of channels and of places, the last three of an image."""
    labels = _own(call)
    return _moved(call, [(*labels[:-3], "", "", "")], labels[-3:], f"{call.name} moves them")


def _scattered_slice(call: OperatorCall) -> Rule:
    """Relate operators that write a tensor to a part of another: of an axis (``slice``), or without it (``select``)."""
    own, source = call.operands[0].shape, call.operands[1].shape
    labels = numbered(len(own))
    if call.name == "diagonal_scatter":
        axes = [axis_of(call, len(own), "dim1"), axis_of(call, len(own), "dim2")]
        written = (*without(labels, axes), "written")
    else:
        axes = [axis_of(call, len(own))]
        written = replaced(labels, axes[0], "written") if len(source) == len(own) else without(labels, axes)
    whole = reasons((*(labels[axis] for axis in axes), "written"), "some of them are written")
    return Relation((labels, aligned(source, written)), (labels,), whole=whole, linear=(frozenset({0, 1}),))


SHAPES: dict[str, OperatorRule] = {
    **each("view reshape _unsafe_view _reshape_alias flatten unflatten ravel view_as reshape_as", _reshape),
    "view_copy": _reshape,
    **each("expand expand_as broadcast_to expand_copy", _widen),
    **each("permute permute_copy", _permute),
    **each("t numpy_T t_copy", _reverse_axes),
    **each("mT mH adjoint", _swap_last),
    **each("transpose swapaxes swapdims transpose_copy", _transpose),
    **each("movedim moveaxis", _move_axes),
    **each("unsqueeze unsqueeze_copy", _unsqueeze),
    **each("squeeze squeeze_copy", _squeeze),
    **each("slice narrow slice_copy narrow_copy", _take),
    **each("split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk", _split),
    **each("unsafe_split_with_sizes split_copy split_with_sizes_copy", _split),
    **each("select unbind select_copy unbind_copy", _pick),
    **each("cat concat concatenate", _cat),
    "stack": _stack,
    "repeat": _repeat,
    "tile": _tile,
    "repeat_interleave": _repeat_each,
    **each("flip roll", _reorder),
    **each("tril triu", _triangle),
    **each("constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d", _pad),
    **each("replication_pad1d replication_pad2d replication_pad3d", _pad),
    **each("unfold unfold_copy", _windows),
    **each("diagonal diagonal_copy linalg_diagonal", _diagonal),
    "diag_embed": _diagonal_embedding,
    **each("view_as_complex view_as_complex_copy", _pairs_as_complex),
    **each("view_as_real view_as_real_copy", _complex_as_pairs),
    **each("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle", _channels_and_places),
    **each("slice_scatter select_scatter diagonal_scatter", _scattered_slice),
}
