"""Record which attributes code reads and writes on modules while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import Factory, define
from torch import nn

_TORCH_ATTRIBUTES = frozenset(
    [
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward", "training"),
        *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_is_full_backward_hook", "_compiled_call_impl", "_parameters", "_buffers", "_modules"),
    ]
)
"""Attributes that torch itself reads of every module: alike in repeated layers, or the hooks of the layout."""

_ACCESSORS = (nn.Module.__module__, "shardplan.functional.layout.hooks")
"""Modules whose code looks up tensors in the dictionary of a module, and reads nothing else there."""

_TRAVERSALS = frozenset(
    [
        *("_buffers", "_modules", "_parameters", "buffers", "children", "get_buffer", "get_parameter", "get_submodule"),
        *("modules", "named_buffers", "named_children", "named_modules", "named_parameters", "parameters", "state_dict"),
        *("apply", "__dict__", "_named_members"),
    ]
)


@define
class AttributeReads:
    """Attributes read of a module and its submodules, as (path, name), and whether any attribute was written."""

    names: set[tuple[str, str]] = Factory(set)
    is_written: bool = False


@contextmanager
def record_reads(module: nn.Module) -> Iterator[AttributeReads]:
    """Record the attributes of a module and its submodules that code reads within the block.

    The modules have derived classes meanwhile.
    """
    reads, classes = AttributeReads(), [(part, type(part)) for part in module.modules()]
    for path, part in module.named_modules():
        # past the module's own __setattr__, which may record writes
        object.__setattr__(part, "__class__", _class_recording_into(reads, path, type(part)))
    try:
        yield reads
    finally:
        for part, cls in classes:
            object.__setattr__(part, "__class__", cls)


def _class_recording_into(reads: AttributeReads, path: str, cls: type[nn.Module]) -> type[nn.Module]:
    def on_read(name: str) -> None:
        if name == "__dict__":
            # any other code may see every attribute
            reads.is_written |= sys._getframe(2).f_globals.get("__name__") not in _ACCESSORS  # noqa: SLF001
        elif name not in _TORCH_ATTRIBUTES and not hasattr(nn.Module, name):
            reads.names.add((path, name))

    def on_write(name: str) -> None:
        reads.is_written |= name not in _TORCH_ATTRIBUTES

    return _observed(cls, on_read, on_write)


@contextmanager
def record_state_reads(module: nn.Module) -> Iterator[set[str]]:
    """Collect the names that code reads of a module within the block, except its configuration and its methods.

    The names collected are state that may change from call to call, submodules, and traversals of the whole module. The
    module has a derived class meanwhile, so it must be a copy that no other thread sees.
    """
    cls = type(module)
    names: set[str] = set()

    def on_read(name: str) -> None:
        if name in _TRAVERSALS or not (name == "config" or hasattr(cls, name)):
            names.add(name)

    module.__class__ = _observed(cls, on_read, names.add)
    try:
        yield names
    finally:
        module.__class__ = cls


def _observed(cls: type[nn.Module], on_read: Callable[[str], None], on_write: Callable[[str], None]) -> type[nn.Module]:
    """Return a class derived from ``cls`` that reports every attribute read or written."""

    def get(self: Any, name: str) -> Any:
        on_read(name)
        return cls.__getattribute__(self, name)

    def put(self: Any, name: str, value: Any) -> None:
        on_write(name)
        cls.__setattr__(self, name, value)

    names = {"__getattribute__": get, "__setattr__": put, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**names, "_shardplan_class": original_class(cls)})


def original_class(cls: type) -> type:
    """Return the class that a recording class derives from, or the class itself."""
    return vars(cls).get("_shardplan_class", cls)


def own_attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Iterate over the instance attributes of a module and its submodules, as (path, name)."""
    return ((path, name) for path, part in module.named_modules() for name in vars(part) if name not in _TORCH_ATTRIBUTES)
