"""Compute the constants of init programs from their recorded operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...specs.json_values import from_plain
from ...specs.program import Constant


def compute(constant: Constant, *, blank: int = 0) -> Tensor:
    """Return a constant as a CPU tensor: its values from the plan, else the result of its operators.

    Args:
        constant: The constant.
        blank: Number with which uninitialised tensors are filled.

    >>> from shardplan.specs import Constant, Node
    >>> compute(Constant((3,), "int64", [Node("arange.start_step", (0, 6, 2), {"dtype": {"dtype": "int64"}})]))
    tensor([0, 2, 4])
    """
    if constant.values is not None:
        values = [from_plain(value) for value in constant.values]
        return torch.tensor(values, dtype=getattr(torch, constant.dtype), device="cpu").reshape(constant.shape)
    results: list[Any] = []
    with torch.no_grad(), torch.device("cpu"), one_thread(), _default_dtype(getattr(torch, constant.default_dtype)):
        for node in constant.nodes:
            args = [decode(value, results) for value in node.args]
            kwargs = {name: decode(value, results) for name, value in node.kwargs.items()}
            result = operator(node.op)(*args, **kwargs)
            results.append(result.fill_(blank) if node.op.startswith(("empty", "new_empty")) else result)
    return results[-1]


def operator(name: str) -> Any:
    """Return the operator of torch with a name: ``mul_.Tensor``."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def decode(value: Any, results: Sequence[Any]) -> Any:
    """Return an argument as torch takes it (``Node`` describes its written form), given the results of earlier nodes."""
    match value:
        case {"node": at, "item": item}:
            return results[at][item]
        case {"node": at}:
            return results[at]
        case {"tensor": values, "shape": shape, "dtype": name}:
            return torch.tensor([from_plain(v) for v in values], dtype=getattr(torch, name), device="cpu").reshape(
                tuple(shape)
            )
        case {"dtype": name} | {"memory_format": name}:
            return getattr(torch, name)
        case tuple():
            return [decode(item, results) for item in value]
        case _:
            return from_plain(value)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread within the block: torch splits long loops among threads, and rounds their ends differently."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
