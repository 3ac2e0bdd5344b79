"""What code reads of the module whose method it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_WALKS = frozenset(
    [
        *("_buffers", "_modules", "_parameters", "buffers", "children", "get_buffer", "get_parameter", "get_submodule"),
        *("modules", "named_buffers", "named_children", "named_modules", "named_parameters", "parameters", "state_dict"),
        *("apply", "__dict__", "_named_members"),
    ]
)


@contextmanager
def watched(module: nn.Module) -> Iterator[set[str]]:
    """Collect what is read of a module within the block that is not the same for every call: state, parts, its whole.

    Its configuration and its methods are not collected. The module is of another class meanwhile, so that it is to be a
    copy that nobody else sees.
    """
    cls = type(module)
    read: set[str] = set()

    def get(self: Any, name: str) -> Any:
        if name in _WALKS or not (name == "config" or hasattr(cls, name)):
            read.add(name)
        return cls.__getattribute__(self, name)

    def put(self: Any, name: str, value: Any) -> None:
        read.add(name)
        cls.__setattr__(self, name, value)

    module.__class__ = type(
        cls.__name__, (cls,), {"__getattribute__": get, "__setattr__": put, "__module__": cls.__module__}
    )
    try:
        yield read
    finally:
        module.__class__ = cls
