"""The example inputs of a plan with stages: written into it, read from it, and with sizes that may vary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...specs.dtypes import is_known
from ...specs.errors import Problem
from ...specs.json_values import is_plain, thawed
from ...specs.pipeline import ExampleInput, PlainInput, TensorInput

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


def recorded(example_inputs: Mapping[str, Any]) -> tuple[tuple[ExampleInput, ...], list[Problem]]:
    """Return example inputs as a plan writes them down, and a problem for each that it cannot.

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
    """Return the example inputs that a plan has written down, tensors on the meta device."""
    return {
        given.name: torch.empty(given.shape, dtype=getattr(torch, given.dtype), device="meta")
        if isinstance(given, TensorInput)
        else thawed(given.value)
        for given in example
    }


def with_free_sizes(example: Iterable[ExampleInput], mode: FakeTensorMode) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return example inputs on fake tensors, and that each size of a tensor may vary as far as the model allows it."""
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
