"""Tell modules and values apart, so that a result for one module can be used for all that are alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

_ATOMS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    FunctionType,
    BuiltinFunctionType,
    torch.dtype,
    torch.device,
)


class Likeness:
    """Tell modules apart by everything that their methods could read: class, attributes, tensors, submodules.

    An object that is no plain value is compared by identity, a tensor of the module by shape and dtype: two layers that
    share a configuration are alike, two layers with a configuration each are not.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[int, int] = {}
        self._kept: list[object] = []  # so that no identity is used again

    def number(self, module: nn.Module) -> int:
        """Return a number that is equal for modules that are alike."""
        if id(module) not in self._known:
            self._kept.append(module)
            self._known[id(module)] = -len(self._kept)  # for a module that is reached from itself
            attributes = tuple((name, self.key(value)) for name, value in vars(module).items())
            self._known[id(module)] = self._numbers.setdefault((type(module), attributes), len(self._numbers))
        return self._known[id(module)]

    def key(self, value: Any) -> Hashable:  # noqa: PLR0911  a case a kind
        """Return a key that is equal for values that are alike."""
        if isinstance(value, nn.Module):
            return nn.Module, self.number(value)
        if isinstance(value, FakeTensor):
            noted = tuple((name, self.key(item)) for name, item in vars(value).items())
            return type(value), tuple(value.shape), value.dtype, value.requires_grad, noted
        if type(value) in _ATOMS:
            return type(value), value
        if type(value) in (dict, OrderedDict):
            return type(value), tuple((self.key(name), self.key(item)) for name, item in value.items())
        if type(value) in (list, tuple):
            return type(value), tuple(map(self.key, value))
        if type(value) in (set, frozenset):
            return type(value), frozenset(map(self.key, value))
        self._kept.append(value)
        return id(value)
