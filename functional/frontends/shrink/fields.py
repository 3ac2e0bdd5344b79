"""The fields of a configuration and of the configurations inside it, each with its path."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import field, frozen

Changes = Mapping["Field", Any]
"""New values by field."""


@frozen
class Field:
    """A field of a configuration.

    Args:
        config: Names of the configurations around it, outermost first: ``("text_config",)``.
        name: Its own name.
        value: Its value.
    """

    config: tuple[str, ...]
    name: str
    value: Any = field(eq=False)

    def __str__(self) -> str:
        return ".".join((*self.config, self.name))

    @property
    def number(self) -> int:
        """Its value as a whole number; 0 if it is none."""
        return self.value if is_number(self.value) else 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Its value as a list of whole numbers; empty if it is none."""
        is_list = isinstance(self.value, (list, tuple)) and all(map(is_number, self.value))
        return tuple(self.value) if is_list else ()


def is_number(value: object) -> bool:
    """Tell whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_fields(config: Any, above: tuple[str, ...] = ()) -> Iterator[Field]:
    """Iterate over the fields of a configuration: its own, then those of the configurations inside it."""
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in public.items():
        if not hasattr(value, "model_type"):
            yield Field(above, name, value)
    for name, value in public.items():
        if hasattr(value, "model_type"):
            yield from read_fields(value, (*above, name))


def changed(config: Any, changes: Changes) -> Any:
    """Return a copy of a configuration with other values of some fields."""
    made = copy.deepcopy(config)
    for to, value in changes.items():
        holder = made
        for name in to.config:
            holder = getattr(holder, name)
        setattr(holder, to.name, value)
    return made
