"""Products of matrices and tensors, and of tokens with their experts."""

from __future__ import annotations

from collections.abc import Sequence

from ..relation import Label, Operand, OperatorCall, Relation, Shape
from .labels import Labels, OperatorRule, aligned, all_numbers, each, numbered, relate, shape_of, tensor, without


def einsum(call: OperatorCall) -> Relation | None:
    """Relate a sum of products, whose equation has the labels."""
    equation = call.arguments["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    ranks = [len(operand.shape) for operand in call.operands]
    num_more = max(
        (rank - len(term.replace("...", "")) for term, rank in zip(inputs.split(","), ranks, strict=True) if "..." in term),
        default=0,
    )
    operands = [
        _letters(term, num_more, rank - len(term.replace("...", "")))
        for term, rank in zip(inputs.split(","), ranks, strict=True)
    ]
    letters = [letter for labels in operands for letter in labels]
    if arrow:
        result = _letters(output, num_more, num_more)
    else:
        single = sorted(letter for letter in set(letters) if letters.count(letter) == 1 and len(letter) == 1)
        result = (*numbered(num_more, "more"), *single)
    sizes = _sizes(operands, [operand.shape for operand in call.operands])
    repeated = {letter for labels in operands for letter in labels if labels.count(letter) > 1}
    shown = [
        tuple("" if size == 1 != sizes[letter] else letter for letter, size in zip(labels, operand.shape, strict=True))
        for labels, operand in zip(operands, call.operands, strict=True)
    ]
    return Relation(
        tuple(shown),
        (result,),
        summed=frozenset(letters) - set(result) - repeated,
        whole=dict.fromkeys(repeated, "a diagonal is taken of them"),
        linear=tuple(frozenset({number}) for number in range(len(call.operands))),
    )


def _letters(term: str, num_more: int, num_own: int) -> Labels:
    before, dots, after = term.partition("...")
    more = numbered(num_more, "more")[num_more - num_own :] if dots else ()
    return (*before, *more, *after)


def _sizes(operands: Sequence[Labels], shapes: Sequence[Shape]) -> dict[Label, int]:
    sizes: dict[Label, int] = {}
    for labels, shape in zip(operands, shapes, strict=True):
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, size), size) if size != 0 else 0
    return sizes


def _product(call: OperatorCall, first: str, second: str, added: str = "") -> Relation:
    """Relate a product of two tensors, by the rules of ``matmul``, and something added to it."""
    a, b = shape_of(call, first), shape_of(call, second)
    batch = numbered(max(len(a), len(b), 2) - 2, "batch")
    labels_a = (*aligned(a[:-2], batch), *("i", "k")[2 - min(len(a), 2) :])
    labels_b = (*aligned(b[:-2], batch), *(("k", "j") if len(b) > 1 else ("k",)))
    result = (*batch, *("i" for _ in a[-2:-1]), *("j" for _ in b[-1:] if len(b) > 1))
    return relate(
        call,
        {first: labels_a, second: labels_b, added: aligned(shape_of(call, added), result)},
        [result],
        summed="k",
        linear=[f"{added} {first}", f"{added} {second}"],
    )


def _matmul(call: OperatorCall) -> Relation:
    return _product(call, "self", "other")


def _mm(call: OperatorCall) -> Relation:
    return _product(call, "self", "mat2")


def _mv(call: OperatorCall) -> Relation:
    return _product(call, "self", "vec")


def _dot(call: OperatorCall) -> Relation:
    return _product(call, "self", "other" if call.name == "vdot" else "tensor")


def _addmm(call: OperatorCall) -> Relation:
    return _product(call, "mat1", "mat2", "self")


def _addmv(call: OperatorCall) -> Relation:
    return _product(call, "mat", "vec", "self")


def _baddbmm(call: OperatorCall) -> Relation:
    return _product(call, "batch1", "batch2", "self")


def _addbmm(call: OperatorCall) -> Relation:
    operands = {"batch1": ("b", "i", "k"), "batch2": ("b", "k", "j"), "self": aligned(shape_of(call, "self"), ("i", "j"))}
    return relate(call, operands, [("i", "j")], summed=("b", "k"), linear=["self batch1", "self batch2"])


def _linear(call: OperatorCall) -> Relation:
    rows = numbered(len(shape_of(call, "input")) - 1)
    columns = ("o",) if len(shape_of(call, "weight")) > 1 else ()
    result = (*rows, *columns)
    operands = {"input": (*rows, "k"), "weight": (*columns, "k"), "bias": aligned(shape_of(call, "bias"), result)}
    return relate(call, operands, [result], summed="k", linear=["input bias", "weight bias"])


def _inner(call: OperatorCall) -> Relation:
    a, b = shape_of(call, "self"), shape_of(call, "other")
    if not a or not b:  # a product with a number
        labels = numbered(len(a) + len(b))
        return relate(call, {"self": labels if a else (), "other": labels if b else ()}, [labels], linear=["self", "other"])
    rows, columns = numbered(len(a) - 1, "row"), numbered(len(b) - 1, "column")
    operands = {"self": (*rows, "k"), "other": (*columns, "k")}
    return relate(call, operands, [(*rows, *columns)], summed="k", linear=["self", "other"])


def _tensordot(call: OperatorCall) -> Relation | None:
    """Relate ``tensordot``, whose axes are given as a number, as a pair of lists, or as two lists."""
    a, b = shape_of(call, "self"), shape_of(call, "other")
    match call.arguments.get("dims_self"), call.arguments.get("dims_other"):
        case int(num), None:
            axes_a, axes_b = list(range(len(a) - num, len(a))), list(range(num))
        case [[*first], [*second]], None:
            axes_a, axes_b = first, second
        case [*first], [*second]:
            axes_a, axes_b = first, second
        case _:
            return None
    labels_a, labels_b = list(numbered(len(a), "row")), list(numbered(len(b), "column"))
    for at, (axis_a, axis_b) in enumerate(zip(axes_a, axes_b, strict=True)):
        is_single = (a[axis_a] == 1, b[axis_b] == 1)  # one entry meets each of the other axis
        labels_a[axis_a] = "" if is_single[0] else f"summed{at}"
        labels_b[axis_b] = "" if is_single[1] else f"summed{at}"
    summed = {label for label in (*labels_a, *labels_b) if label.startswith("summed")}
    gone_a, gone_b = {axis % len(a) for axis in axes_a}, {axis % len(b) for axis in axes_b}
    result = (*without(tuple(labels_a), gone_a), *without(tuple(labels_b), gone_b))
    operands = {"self": tuple(labels_a), "other": tuple(labels_b)}
    return relate(call, operands, [result], summed=summed, linear=["self", "other"])


def _outer(call: OperatorCall) -> Relation:
    return relate(call, {"self": ("i",), "vec2": ("j",)}, [("i", "j")], linear=["self", "vec2"])


def _addr(call: OperatorCall) -> Relation:
    operands = {"self": aligned(shape_of(call, "self"), ("i", "j")), "vec1": ("i",), "vec2": ("j",)}
    return relate(call, operands, [("i", "j")], linear=["self vec1", "self vec2"])


def _bilinear(call: OperatorCall) -> Relation:
    rows = numbered(len(shape_of(call, "input1")) - 1)
    operands = {"input1": (*rows, "a"), "input2": (*rows, "b"), "weight": ("o", "a", "b"), "bias": ("o",)}
    return relate(call, operands, [(*rows, "o")], summed="ab", linear=["input1 bias", "input2 bias", "weight bias"])


def _trilinear(call: OperatorCall) -> Relation:
    args = call.arguments
    rank = len(shape_of(call, "i1")) + len(args["expand1"])
    labels, operands = numbered(rank), {}
    for name, expanded in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        own = tuple(label for axis, label in enumerate(labels) if axis not in args[expanded])
        operands[name] = tuple("" if size == 1 else label for size, label in zip(shape_of(call, name), own, strict=True))
    result = tuple(label for axis, label in enumerate(labels) if axis not in args["sumdim"])
    summed = {labels[axis] for axis in args["sumdim"]}
    return relate(call, operands, [result], summed=summed, linear=["i1", "i2", "i3"])


def _cross(call: OperatorCall) -> Relation:
    rank = len(call.shapes[0])
    labels = numbered(rank)
    axis = labels[(call.arguments["dim"] if call.arguments.get("dim") is not None else -1) % rank]
    operands = {name: aligned(shape_of(call, name), labels) for name in ("self", "other")}
    return relate(call, operands, [labels], whole={axis: "a cross product is taken over them"}, linear=["self", "other"])


def _grouped_mm(call: OperatorCall) -> Relation | None:
    """Relate a product of the rows of each group with the group's own matrix; where groups end is counted in all rows."""
    whole = {"g": "each group has its own matrix", "t": "groups are counted in all rows"}
    match len(shape_of(call, "self")), len(shape_of(call, "mat2")):
        case 2, 3:
            first, second, result = ("t", "k"), ("g", "k", "j"), ("t", "j")
        case 3, 2:
            first, second, result = ("g", "i", "k"), ("k", "t"), ("i", "t")
        case 2, 2:
            first, second, result = ("i", "t"), ("t", "j"), ("g", "i", "j")
        case _:
            first, second, result = ("b", "i", "k"), ("b", "k", "j"), ("b", "i", "j")
    if tensor(call, "bias") is not None:
        return None
    summed = "k" if "k" in first else ()
    offsets = tuple("g" for _ in shape_of(call, "offs"))
    return relate(
        call,
        {"self": first, "mat2": second, "offs": offsets},
        [result],
        summed=summed,
        whole={label: reason for label, reason in whole.items() if label in (*first, *second, *offsets)},
        linear=["self", "mat2"],
    )


def _grouped_mm_of_transformers(call: OperatorCall) -> Relation | None:
    """Relate transformers' own product of groups, whose gradient is its derivative."""
    rows, matrices, ends = ("t", "k"), ("g", "k", "j"), ("g",)
    whole = {"g": "each group has its own matrix", "t": "groups are counted in all rows"}
    operands = {"input": rows, "weight": matrices, "offs": ends}
    return relate(call, operands, [("t", "j")], summed="k", whole=whole, linear=["input", "weight"])


def _chain(call: OperatorCall) -> Relation | None:
    operands: list[Operand] = list(call.operands)
    if any(len(operand.shape) != 2 for operand in operands):  # noqa: PLR2004
        return None
    labels = tuple((f"k{number}", f"k{number + 1}") for number in range(len(operands)))
    ends = (labels[0][0], labels[-1][1])
    summed = frozenset(label for pair in labels for label in pair) - set(ends)
    return Relation(labels, (ends,), summed=summed, linear=tuple(frozenset({number}) for number in all_numbers(call)))


PRODUCTS: dict[str, OperatorRule] = {
    "einsum": einsum,
    "matmul": _matmul,
    "mm": _mm,
    "bmm": _mm,
    "mv": _mv,
    **each("dot vdot", _dot),
    "addmm": _addmm,
    "addmv": _addmv,
    "baddbmm": _baddbmm,
    "addbmm": _addbmm,
    "linear": _linear,
    "inner": _inner,
    "tensordot": _tensordot,
    "outer": _outer,
    "addr": _addr,
    "bilinear": _bilinear,
    "_trilinear": _trilinear,
    **each("cross linalg_cross", _cross),
    "_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm_of_transformers,
    "linalg_multi_dot": _chain,
}
