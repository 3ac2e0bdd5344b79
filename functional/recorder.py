"""What a piece of code does to known tensors, learnt by running it on fake ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from attrs import Factory, define
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OVERWRITES = frozenset(
    f"aten::{name}_"
    for name in (
        *("bernoulli", "cauchy", "copy", "exponential", "fill", "geometric"),
        *("log_normal", "normal", "random", "uniform", "zero"),
    )
)
_MAX_GUESSES = 64


class DependsOnValuesError(RuntimeError):
    """The code keeps asking fake tensors for values that they have not."""


View = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A part of a storage: offset, shape and stride, in elements."""


def whole_view(shape: tuple[int, ...]) -> View:
    """Return the view that is a whole contiguous tensor."""
    return (0, shape, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))))


def num_covered(views: Iterable[View], num_elements: int) -> int:
    """Return how many elements of a storage are in at least one of some views.

    >>> num_covered([(0, (9,), (1,)), (0, (1,), (1,))], num_elements=10)
    9
    """
    distinct = set(views)
    if any(prod(shape) >= num_elements for _, shape, _ in distinct):
        return num_elements
    mask = np.zeros(num_elements, dtype=bool)
    for offset, shape, stride in distinct:
        np.lib.stride_tricks.as_strided(mask[offset:], shape, stride)[...] = True  # an element of the mask is one byte
    return int(mask.sum())


@define
class Touch:
    """What was done to one tensor.

    Args:
        reads: Whether its values were asked for.
        writes: Whether it was written at all.
        overwritten: Views of it that were written without looking: offset, shape and stride, in elements.
    """

    reads: bool = False
    writes: bool = False
    overwritten: set[View] = Factory(set)


class Recorder(TorchDispatchMode):
    """Notes which known tensors the operations within the block read and write.

    A question for one value (``tensor.item()``, ``if tensor.any()``) is answered with zero, so that a loop that draws
    again what falls outside an interval ends after its first draw.

    Args:
        storages: Names of the known tensors, by the identity of their storage.
    """

    def __init__(self, storages: Mapping[int, str]) -> None:
        super().__init__()
        self.touched: dict[str, Touch] = {}
        self._storages = storages
        self._num_guesses = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001  the operator's name
            return self._guess(args[0])
        overwrites = func._schema.name in _OVERWRITES or func._schema.overload_name.endswith("out")  # noqa: SLF001
        for argument, value in _arguments(func, args, kwargs):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                name = self._name(tensor)
                if name is None:
                    continue
                touch = self.touched.setdefault(name, Touch())
                if not is_write:
                    touch.reads |= not _is_view(func)
                    continue
                touch.writes = True
                if overwrites:
                    touch.overwritten.add((tensor.storage_offset(), tuple(tensor.shape), tensor.stride()))
        return func(*args, **kwargs)

    def _name(self, value: Any) -> str | None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        return self._storages.get(value.untyped_storage()._cdata)  # noqa: SLF001  the only identity of a fake storage

    def _guess(self, asked: Tensor) -> bool | int | float:
        self._num_guesses += 1
        if self._num_guesses > _MAX_GUESSES:
            msg = "init code depends on the values of its tensors"
            raise DependsOnValuesError(msg)
        if asked.dtype == torch.bool:
            return False
        return 0.0 if asked.dtype.is_floating_point else 0


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    declared = func._schema.arguments  # noqa: SLF001
    by_name = {argument.name: argument for argument in declared}
    return [
        *zip(declared, args, strict=False),
        *((by_name[name], value) for name, value in kwargs.items() if name in by_name),
    ]


def _is_view(func: Any) -> bool:
    """Whether an operator only makes a view, or another tensor of the same kind, without reading a value."""
    schema = func._schema  # noqa: SLF001
    returns_alias = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return (
        returns_alias
        or schema.name.startswith(("aten::empty", "aten::new_", "aten::sym_"))
        or schema.name
        in (
            "aten::zeros_like",
            "aten::ones_like",
            "aten::rand_like",
            "aten::randn_like",
        )
    )
