"""The example inputs of a plan with stages, and the names of the sizes that may vary from batch to batch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor
from torch.utils._pytree import tree_map

from ...specs.dtypes import is_known
from ...specs.errors import Problem
from ...specs.json_values import is_plain, thawed
from ...specs.pipeline import Activation, ExampleInput, PlainInput, Size, TensorInput, VariableSize

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


def recorded(example_inputs: Mapping[str, Any]) -> tuple[tuple[ExampleInput, ...], list[Problem]]:
    """Return the plan's record of example inputs, and the problems of inputs that it cannot record.

    >>> print(*recorded({"x": torch.zeros(2, 4), "scale": 2})[0])
    TensorInput(name='x', shape=(2, 4), dtype='float32') PlainInput(name='scale', value=2)
    """
    inputs: list[ExampleInput] = []
    problems: list[Problem] = []
    for name, value in example_inputs.items():
        dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
        if isinstance(value, Tensor) and is_known(dtype):
            inputs.append(TensorInput(name, tuple(value.shape), dtype))
        elif is_plain(value):
            inputs.append(PlainInput(name, value))
        else:
            cause = f"a plan holds tensors and plain values, and this is {type(value).__name__} {dtype}".rstrip()
            problems.append(Problem(f"example_inputs[{name!r}]", cause, "Leave it out, or give a plain value"))
    return tuple(inputs), problems


def read_back(example: Iterable[ExampleInput]) -> dict[str, Any]:
    """Return the example inputs of a plan's record, tensors on the meta device."""
    return {
        given.name: torch.empty(given.shape, dtype=getattr(torch, given.dtype), device="meta")
        if isinstance(given, TensorInput)
        else thawed(given.value)
        for given in example
    }


def with_free_sizes(example: Iterable[ExampleInput], mode: FakeTensorMode) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return example inputs on fake tensors, and for ``torch.export`` their sizes, all of which may vary."""
    inputs: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    for given in example:
        match given:
            case TensorInput(name=name, shape=shape, dtype=dtype):
                with mode:
                    inputs[name] = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
                sizes[name] = dict.fromkeys(range(len(shape)), torch.export.Dim.AUTO)
            case PlainInput(name=name, value=value):
                inputs[name] = thawed(value)
                sizes[name] = tree_map(lambda _: None, inputs[name])
    return inputs, sizes


class SizeNames:
    """Names of the sizes that may vary: ``batch`` and ``sequence`` for the first such axes of the inputs.

    Args:
        inputs: The model's inputs, by name.
        ranges: Least and most of each size, by symbol.

    Attributes:
        sizes: The sizes that may vary, by name.
    """

    def __init__(self, inputs: Iterable[tuple[str, Tensor]], ranges: Mapping[str, tuple[int, int | None]]) -> None:
        self.sizes: dict[str, VariableSize] = {}
        self._symbols: dict[str, str] = {}
        for input_name, tensor in inputs:
            for axis, size in enumerate(tensor.shape):
                symbols = sorted(map(str, size.node.expr.free_symbols)) if isinstance(size, SymInt) else []
                if len(symbols) == 1 and symbols[0] not in self._symbols:
                    name = self._usual(axis, tensor.dim()) or f"{input_name}_{axis}"
                    self._symbols[symbols[0]] = name
                    self.sizes[name] = VariableSize(name, example_size(size), *ranges.get(symbols[0], (0, None)))

    def activation(self, name: str, tensor: Tensor, *, requires_grad: bool) -> Activation:
        """Return the plan's record of a tensor of the export."""
        return Activation(
            name=name,
            shape=tuple(map(self.name, tensor.shape)),
            dtype=str(tensor.dtype).removeprefix("torch."),
            num_bytes=example_bytes(tensor),
            requires_grad=requires_grad,
        )

    def _usual(self, axis: int, num_axes: int) -> str | None:
        """Return the usual name of an input's axis; images have four axes, and no sequence."""
        name = {0: "batch", 1: "sequence"}.get(axis) if num_axes <= 3 else {0: "batch"}.get(axis)  # noqa: PLR2004
        return None if name in self.sizes else name

    def name(self, size: int | SymInt) -> Size:
        """Return the written form of a size: a number, a name, or a formula of names."""
        if isinstance(size, int) or size.node.expr.is_Integer:
            return size if isinstance(size, int) else int(size.node.expr)
        return re.sub(r"[A-Za-z_]\w*", lambda found: self._symbols.get(found[0], found[0]), str(size.node.expr))


def example_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor at the sizes of the example inputs."""
    return prod(map(example_size, tensor.shape)) * tensor.element_size()


def example_size(size: int | SymInt) -> int:
    """Return the value of a size for the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)
