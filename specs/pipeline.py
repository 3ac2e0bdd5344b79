"""How a model is cut along ``pipe``: its stages, and the tensors that cross between them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, Literal

from attrs import field, frozen
from frozendict import deepfreeze

from .dtypes import short_name
from .json_values import check_plain

By = Literal["parameters", "flops"]
"""Weight by which stages are balanced: elements of parameters, or floating-point operations of a forward pass."""

Size = int | str
"""A size of a tensor's axis: a number, a name of a size that may differ from batch to batch, or a formula of names."""

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
_FUNCTIONS: dict[str, Callable[[int, int], int]] = {
    "CleanDiv": lambda a, b: a // b,
    "FloorDiv": lambda a, b: a // b,
    "Max": max,
    "Min": min,
    "Mod": lambda a, b: a % b,
    "PythonMod": lambda a, b: a % b,
}
"""Names of torch for the operators of sizes."""


def size_in(size: Size, sizes: Mapping[str, int]) -> int:
    """Evaluate a size (a number, a name, or a formula of names), given the variable sizes.

    Raises:
        ValueError: If it is no such formula.

    >>> size_in("2*batch + 1", {"batch": 4})
    9
    """
    return size if isinstance(size, int) else _value(ast.parse(size, mode="eval").body, sizes)


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Tell whether a condition on sizes holds: formulas joined by comparisons, ``and`` and ``or``.

    Raises:
        ValueError: If it is none.

    >>> holds("batch % 2 == 0", {"batch": 4}), holds("sequence <= 2*batch", {"batch": 4, "sequence": 9})
    (True, False)
    """
    return _truth(ast.parse(condition, mode="eval").body, sizes)


def _truth(tree: ast.expr, sizes: Mapping[str, int]) -> bool:
    match tree:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return _COMPARISONS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_truth(value, sizes) for value in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_truth(value, sizes) for value in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _truth(operand, sizes)
        case _:
            msg = f"{ast.unparse(tree)} is no condition on {', '.join(sizes)}"
            raise ValueError(msg)


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    match tree:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=[left, right]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(left, sizes), _value(right, sizes))
        case _:
            msg = f"{ast.unparse(tree)} is no size that can be computed from {', '.join(sizes)}"
            raise ValueError(msg)


@frozen
class TensorInput:
    """A tensor that the model is called with.

    Args:
        name: The argument of the model's ``forward``.
        shape: Its shape in the example.
        dtype: torch's name of its element type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@frozen
class PlainInput:
    """A plain value that the model is called with; it is the same in every call."""

    name: str
    value: Any = field(converter=deepfreeze, validator=check_plain)


ExampleInput = TensorInput | PlainInput


@frozen
class VariableSize:
    """A size that may differ from batch to batch.

    Args:
        name: Its name in shapes.
        example: Its value in the example inputs.
        least: The smallest value for which the model's code does as planned.
        most: The largest; None if there is none.
    """

    name: str
    example: int
    least: int = 0
    most: int | None = None


@frozen
class Activation:
    """An input or output tensor of a stage, for a micro-batch.

    Args:
        name: The model's input, or the module that computes it.
        shape: Its shape; a size that may differ is named.
        dtype: torch's name of its element type.
        num_bytes: Its bytes at the sizes of the example inputs.
        requires_grad: Whether a gradient comes back for it.
    """

    name: str
    shape: tuple[Size, ...]
    dtype: str
    num_bytes: int
    requires_grad: bool = False

    def shape_in(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return its shape where the variable sizes are known; raise ValueError if it cannot be computed from them."""
        return tuple(size_in(size, sizes) for size in self.shape)

    @property
    def type(self) -> str:
        """The printed form of its type, e.g. ``bf16[batch, sequence, 4096]``."""
        return f"{short_name(self.dtype)}[{', '.join(map(str, self.shape))}]"

    def __str__(self) -> str:
        return f"{self.name} {self.type}"


@frozen
class Stage:
    """A part of the model along ``pipe``.

    Args:
        modules: The outermost modules that run in it as a whole.
        inputs: Its inputs: the model's, or the outputs of the stage before.
        outputs: Its outputs, in the order in which they are sent; of the last stage the tensors that the model returns.
        digest: SHA-256 over its graphs, in training and in evaluation, in hexadecimal digits.
    """

    modules: tuple[str, ...]
    inputs: tuple[Activation, ...]
    outputs: tuple[Activation, ...]
    digest: str

    @property
    def output_bytes(self) -> int:
        """Bytes of its outputs, for a micro-batch of the size of the example inputs."""
        return sum(output.num_bytes for output in self.outputs)


@frozen
class Pipeline:
    """How a model is cut, and the stages that result.

    Args:
        stages: The stages, in order. Stage s runs at place s mod ``pipe`` of the mesh axis ``pipe``.
        cuts: The module after which each stage but the last ends.
        chain: The modules of the stages where they were handed over, or the model is a sequence; then nothing is exported.
        leaves: Modules that the export does not look into.
        example: The example inputs while planning.
        sizes: The sizes that may differ from batch to batch.
        conditions: Conditions on the sizes without which the model's code takes another branch.
    """

    stages: tuple[Stage, ...]
    cuts: tuple[str, ...] = ()
    chain: tuple[tuple[str, ...], ...] = ()
    leaves: tuple[str, ...] = ()
    example: tuple[ExampleInput, ...] = ()
    sizes: tuple[VariableSize, ...] = ()
    conditions: tuple[str, ...] = ()


@frozen
class Even:
    """A wish for balanced stages.

    Args:
        num_stages: Number of stages.
        by: Weight by which they are balanced.
    """

    num_stages: int
    by: By
