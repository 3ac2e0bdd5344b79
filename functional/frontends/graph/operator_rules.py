"""Rules of operators: the axes of their outputs in factors of their inputs, and the factors that cannot be split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from attrs import frozen

from .factors import Axis, Factor, block, laid_out, part, reshape, size_of, unify, unsplittable

Axes = tuple[Axis, ...]
"""The axes of a tensor."""

Shape = tuple[int, ...]


@frozen
class OperatorCall:
    """A call of an operator.

    Args:
        name: The operator, without its overload.
        arguments: Its arguments by name, with defaults; tensors as :class:`TensorArgument`.
        shapes: Shapes of its outputs.
        is_pointwise: Whether torch says that it works entry by entry.
    """

    name: str
    arguments: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    is_pointwise: bool = False

    @property
    def shape(self) -> Shape:
        """The shape of its first output."""
        return self.shapes[0]

    @property
    def own(self) -> Axes:
        """The axes of its first tensor."""
        return next(self.tensors())

    def tensors(self) -> Iterator[Axes]:
        """Iterate over the axes of the tensors among its arguments, also in lists."""
        for value in self.arguments.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(inner, TensorArgument):
                    yield inner.axes

    def axis(self, name: str = "dim", rank: int | None = None) -> int:
        """Return an axis among the arguments, counted from 0."""
        return self.arguments[name] % (len(self.own) if rank is None else rank)


@frozen
class TensorArgument:
    """A tensor among the arguments of a call."""

    axes: Axes


OperatorRule = Callable[[OperatorCall], Sequence[Axes]]


def apply_rule(call: OperatorCall) -> Sequence[Axes]:
    """Return the axes of a call's outputs; an operator without a rule blocks the axes of its inputs."""
    rule = RULES.get(call.name)
    made = rule(call) if rule else pointwise(call) if call.is_pointwise else ()
    if [tuple(map(size_of, axes)) for axes in made] == list(call.shapes):
        return made
    for axes in call.tensors():
        _block_all(axes, f"{call.name} works on them")
    return [tuple(unsplittable(size, f"{call.name} makes it whole") for size in shape) for shape in call.shapes]


def broadcast(tensors: Sequence[Axes], rank: int) -> Axes:
    """Return the axes of tensors that are broadcast together, aligned from the last axis."""
    made: list[Axis] = []
    for at in range(1, rank + 1):
        met = [axes[-at] for axes in tensors if at <= len(axes) and size_of(axes[-at]) > 1]
        for other in met[1:]:
            unify(met[0], other)
        made.append(met[0] if met else ())
    return tuple(reversed(made))


def pointwise(call: OperatorCall) -> Sequence[Axes]:
    """Follow an operator that works entry by entry."""
    return [broadcast(list(call.tensors()), len(call.shape))] * len(call.shapes)


def product(call: OperatorCall) -> Sequence[Axes]:
    """Follow a product of activations, whose summed axis cannot be split."""
    first, second = [call.arguments[name].axes for name in _operands(call)]
    rows = first[:-2] if len(first) > 1 else ()
    columns = second[:-2] if len(second) > 1 else ()
    batch = broadcast([rows, columns], max(len(rows), len(columns)))
    summed = second[-2] if len(second) > 1 else second[-1]
    unify(first[-1], summed)
    block(first[-1], "they are summed over within the model's own code")
    block(summed, "they are summed over within the model's own code")
    made = (*batch, *first[-2:-1], *(second[-1:] if len(second) > 1 else ()))
    return [_with_added(call, made)]


def linear(call: OperatorCall, *, out_axis: int) -> Sequence[Axes]:
    """Follow a product with a linear module's weight, whose summed axis may be split if the sums are added up."""
    first, second = [call.arguments[name].axes for name in _operands(call)]
    unify(first[-1], second[1 - out_axis])
    return [_with_added(call, (*first[:-1], second[out_axis]))]


def _operands(call: OperatorCall) -> tuple[str, str]:
    for names in (("mat1", "mat2"), ("batch1", "batch2"), ("input", "weight"), ("self", "mat2"), ("self", "other")):
        if all(isinstance(call.arguments.get(name), TensorArgument) for name in names):
            return names
    msg = f"{call.name} has operands {list(call.arguments)}"
    raise AssertionError(msg)


def _with_added(call: OperatorCall, made: Axes) -> Axes:
    added = [call.arguments["bias"]] if call.name == "linear" else [call.arguments["self"]] if call.name in _ADDING else []
    return broadcast([made, *(met.axes for met in added if isinstance(met, TensorArgument))], len(made))


_ADDING = ("addmm", "baddbmm", "addbmm")


def _attention(call: OperatorCall) -> Sequence[Axes]:
    query, key, value = (call.arguments[name].axes for name in ("query", "key", "value"))
    unify(query[-1], key[-1])
    block(query[-1], "queries and keys are multiplied over them")
    unify(key[-2], value[-2])
    block(key[-2], "softmax is taken over them")
    if call.arguments.get("enable_gqa") and size_of(query[-3]) != size_of(key[-3]):
        unify(query[-3], (*key[-3], Factor(size_of(query[-3]) // size_of(key[-3]))))
        unify(key[-3], value[-3])
        made = query[:-1]
    else:
        rank = max(len(query), len(key)) - 2
        made = (*broadcast([query[:-2], key[:-2], value[:-2]], rank), query[-2])
    if isinstance(mask := call.arguments.get("attn_mask"), TensorArgument):
        broadcast([(*made[:-1], query[-2], key[-2]), mask.axes], len(made) + 1)
    return [(*made, value[-1])]


def _softmax(call: OperatorCall) -> Sequence[Axes]:
    block(call.own[call.axis()], f"{call.name.strip('_')} is taken over them")
    return [call.own]


def _norm(call: OperatorCall) -> Sequence[Axes]:
    axes, num = call.own, len(call.arguments["normalized_shape"])
    for axis in axes[-num:]:
        block(axis, "a norm is taken over them")
    for name in ("weight", "bias"):
        if isinstance(met := call.arguments.get(name), TensorArgument):
            broadcast([axes, met.axes], len(axes))
    return [axes]


def _reduce(call: OperatorCall) -> Sequence[Axes]:
    axes, dims = call.own, call.arguments.get("dim")
    if dims is None or dims == []:
        dims = range(len(axes))
    reduced = {dim % len(axes) for dim in (dims if isinstance(dims, (list, tuple, range)) else [dims])} if axes else set()
    for at in reduced:
        block(axes[at], f"{call.name} is taken over them")
    if len(call.shape) == len(axes):
        made = tuple(() if at in reduced else axis for at, axis in enumerate(axes))
    else:
        made = tuple(axis for at, axis in enumerate(axes) if at not in reduced)
    return [made] * len(call.shapes)


def _reshape(call: OperatorCall) -> Sequence[Axes]:
    return [tuple(reshape(call.own, call.shape))]


def _same(call: OperatorCall) -> Sequence[Axes]:
    return [call.own] * len(call.shapes)


def _filled(call: OperatorCall) -> Sequence[Axes]:
    return [tuple((Factor(size),) if size != 1 else () for size in call.shape)]


def _permute(call: OperatorCall) -> Sequence[Axes]:
    axes = call.own
    if call.name in {"t", "numpy_T"}:
        return [axes[::-1]]
    if call.name in {"mT", "adjoint"}:
        return [(*axes[:-2], axes[-1], axes[-2])]
    if call.name == "permute":
        return [tuple(axes[dim] for dim in call.arguments["dims"])]
    first, second = ("axis0", "axis1") if call.name == "swapaxes" else ("dim0", "dim1")
    order = list(axes)
    a, b = call.axis(first), call.axis(second)
    order[a], order[b] = order[b], order[a]
    return [tuple(order)]


def _unsqueeze(call: OperatorCall) -> Sequence[Axes]:
    at = call.axis(rank=len(call.own) + 1)
    return [(*call.own[:at], (), *call.own[at:])]


def _squeeze(call: OperatorCall) -> Sequence[Axes]:
    dims = call.arguments.get("dim")
    dims = range(len(call.own)) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {dim % len(call.own) for dim in dims if size_of(call.own[dim]) == 1}
    return [tuple(axis for at, axis in enumerate(call.own) if at not in gone)]


def _expand(call: OperatorCall) -> Sequence[Axes]:
    new = len(call.shape) - len(call.own)
    sizes = zip(call.shape, (*((),) * new, *call.own), strict=True)
    return [tuple(axis if size_of(axis) == size else (Factor(size),) for size, axis in sizes)]


def _repeat(call: OperatorCall) -> Sequence[Axes]:
    repeats = call.arguments["repeats"]
    axes = (*((),) * (len(repeats) - len(call.own)), *call.own)
    return [tuple((Factor(num), *axis) if num > 1 else axis for num, axis in zip(repeats, axes, strict=True))]


def _repeat_interleave(call: OperatorCall) -> Sequence[Axes]:
    num, dim = call.arguments.get("repeats"), call.arguments.get("dim")
    if not isinstance(num, int) or dim is None:
        for axes in call.tensors():
            _block_all(axes, "repeat_interleave works on them")
        return [tuple(unsplittable(size, "repeat_interleave makes it whole") for size in call.shape)]
    at = call.axis()
    return [tuple((*axis, Factor(num)) if i == at and num > 1 else axis for i, axis in enumerate(call.own))]


def _split(call: OperatorCall) -> Sequence[Axes]:
    at, bounds = call.axis(), [0]
    for shape in call.shapes:
        bounds.append(bounds[-1] + shape[call.axis()])
    return [_with_part(call.own, at, start, stop) for start, stop in pairwise(bounds)]


def _slice(call: OperatorCall) -> Sequence[Axes]:
    at, axes = call.axis(), call.own
    size, start, step = size_of(axes[at]), call.arguments.get("start") or 0, call.arguments.get("step", 1)
    if step != 1:
        block(axes[at], "every so many of them are taken")
        return [(*axes[:at], unsplittable(call.shape[at], "it is a part of something whole"), *axes[at + 1 :])]
    start = max(0, min(size, start + size if start < 0 else start))
    return [_with_part(axes, at, start, start + call.shape[at])]


def _with_part(axes: Axes, at: int, start: int, stop: int) -> Axes:
    if start == stop:
        return (*axes[:at], unsplittable(0, "it is empty"), *axes[at + 1 :])
    return (*axes[:at], part(axes[at], start, stop), *axes[at + 1 :])


def _pick(call: OperatorCall) -> Sequence[Axes]:
    at = call.axis()
    block(call.own[at], "single ones of them are picked", is_picked=True)
    return [(*call.own[:at], *call.own[at + 1 :])] * len(call.shapes)


def _cat(call: OperatorCall) -> Sequence[Axes]:
    rank = len(call.shape)
    tensors = [axes for axes in call.tensors() if len(axes) == rank]  # empty tensors may have another rank
    at = call.axis(rank=rank)
    met = broadcast([(*axes[:at], (), *axes[at + 1 :]) for axes in tensors], rank)
    blocks = [axes[at] for axes in tensors if size_of(axes[at])]
    return [(*met[:at], laid_out(blocks), *met[at + 1 :])]


def _stack(call: OperatorCall) -> Sequence[Axes]:
    at = call.axis(rank=len(call.shape))
    met = list(broadcast(list(call.tensors()), len(call.shape) - 1))
    return [(*met[:at], unsplittable(call.shape[at], "its entries are put together one by one"), *met[at:])]


def _look_up(call: OperatorCall) -> Sequence[Axes]:
    rows, *columns = call.arguments["weight"].axes
    block(rows, "rows are looked up by number")
    return [(*call.arguments["indices"].axes, *columns)]


def _index(call: OperatorCall) -> Sequence[Axes]:
    axes, given = call.own, call.arguments["indices"]
    picking = [met for met in given if isinstance(met, TensorArgument)]
    if len(picking) < len(given):  # an axis before an indexed axis is not indexed
        for met in call.tensors():
            _block_all(met, "they are indexed")
        return [tuple(unsplittable(size, "it is picked by number") for size in call.shape)]
    for axis in axes[: len(picking)]:
        block(axis, "they are picked by number")
    kept = axes[len(picking) :]
    met = broadcast([found.axes for found in picking], len(call.shape) - len(kept))
    return [(*met, *kept)] if len(met) + len(kept) == len(call.shape) else [_unknown(call.shape)]


def _unknown(shape: Shape) -> Axes:
    return tuple(unsplittable(size, "it is picked by number") for size in shape)


def _block_all(axes: Axes, reason: str) -> None:
    for axis in axes:
        block(axis, reason)


RULES: dict[str, OperatorRule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("contiguous", "clone", "to", "_to_copy", "type_as", "dropout", "native_dropout"), _same),
    **dict.fromkeys(("detach", "detach_", "alias", "lift_fresh_copy", "dropout_", "feature_dropout"), _same),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "fill_", "zero_", "float"), _same),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty", "new_empty"), _filled),
    **dict.fromkeys(("transpose", "permute", "t", "numpy_T", "mT", "adjoint", "swapaxes"), _permute),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("select", "unbind"), _pick),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod"), _softmax),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _norm),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "std", "all", "any", "logsumexp"), _reduce),
    **dict.fromkeys(("argmax", "argmin", "prod", "linalg_vector_norm", "norm", "count_nonzero"), _reduce),
    **dict.fromkeys(("where", "__and__", "__or__", "__xor__", "copy_", "maximum", "minimum"), pointwise),
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "linear"), product),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "cat": _cat,
    "stack": _stack,
    "embedding": _look_up,
    "index": _index,
    "scaled_dot_product_attention": _attention,
}
"""How each operator treats axes; operators that torch calls pointwise need no entry."""
