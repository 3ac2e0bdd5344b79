"""Plain values: what JSON can hold, and so a plan."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from attrs import Attribute


def is_plain(value: object) -> bool:
    """Tell whether a value is made of finite numbers, strings, booleans, None, lists and dictionaries with string keys.

    >>> is_plain({"heads": [1, 2]}), is_plain({"heads": object()}), is_plain({1: 2})
    (True, False, False)
    """
    match value:
        case None | bool() | int() | str():
            return True
        case float():
            return isfinite(value)
        case list() | tuple():
            return all(is_plain(item) for item in cast("list[Any]", value))
        case Mapping():
            items = cast("Mapping[Any, Any]", value).items()
            return all(isinstance(key, str) and is_plain(item) for key, item in items)
        case _:
            return False


def check_plain(_: object, attribute: Attribute[Any], value: object) -> None:
    """Raise ValueError if a record is given what is not plain: an attrs validator."""
    if not is_plain(value):
        msg = f"{attribute.name}: a plan holds plain, finite JSON values, not {value!r}"
        raise ValueError(msg)


def check_integer(_: object, attribute: Attribute[Any], value: object) -> None:
    """Raise TypeError if a record is given anything but an integer: an attrs validator, to which True is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{attribute.name} is an integer, not {value!r}"
        raise TypeError(msg)
