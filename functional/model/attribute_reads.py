"""What code reads of a module and of those in it, while it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrs import Factory, define
from torch import nn

_OWN = frozenset(
    [
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward", "training"),
        *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_is_full_backward_hook", "_compiled_call_impl", "_parameters", "_buffers", "_modules"),
    ]
)
"""What torch itself reads of every module; families agree in it, and hooks are the layout's."""


@define
class Reads:
    """What is read of the modules in one, by path and name; whether anything is written there."""

    names: set[tuple[str, str]] = Factory(set)
    is_written: bool = False


@contextmanager
def reading(module: nn.Module) -> Iterator[Reads]:
    """Note what code reads of the modules in one within the block. They are of other classes meanwhile."""
    read, classes = Reads(), [(part, type(part)) for part in module.modules()]
    for path, part in module.named_modules():
        object.__setattr__(part, "__class__", _watched(path, type(part), read))  # its own may note what is written
    try:
        yield read
    finally:
        for part, cls in classes:
            object.__setattr__(part, "__class__", cls)


def _watched(path: str, cls: type[nn.Module], read: Reads) -> type[nn.Module]:
    def get(self: Any, name: str) -> Any:
        if name == "__dict__":
            # nn.Module looks its tensors and modules up there; other code may see everything
            read.is_written |= sys._getframe(1).f_globals.get("__name__") != nn.Module.__module__  # noqa: SLF001
        elif name not in _OWN and not hasattr(nn.Module, name):
            read.names.add((path, name))
        return cls.__getattribute__(self, name)

    def put(self: Any, name: str, value: Any) -> None:
        read.is_written |= name not in _OWN
        cls.__setattr__(self, name, value)

    names = {"__getattribute__": get, "__setattr__": put, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**names, "_shardplan_class": unwatched(cls)})


def unwatched(cls: type) -> type:
    """Return the class that a watched one stands for, or the class itself."""
    return vars(cls).get("_shardplan_class", cls)


def own_attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Iterate over what the modules in one have of their own, by path and name."""
    return ((path, name) for path, part in module.named_modules() for name in vars(part) if name not in _OWN)
