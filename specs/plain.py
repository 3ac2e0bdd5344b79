"""Plain values: what JSON can hold, and so a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


def is_plain(value: object) -> bool:
    """Tell whether a value is made of numbers, strings, booleans, None, lists and dictionaries with string keys.

    >>> is_plain({"heads": [1, 2]}), is_plain({"heads": object()}), is_plain({1: 2})
    (True, False, False)
    """
    match value:
        case None | bool() | int() | float() | str():
            return True
        case list() | tuple():
            return all(is_plain(item) for item in cast("list[Any]", value))
        case Mapping():
            items = cast("Mapping[Any, Any]", value).items()
            return all(isinstance(key, str) and is_plain(item) for key, item in items)
        case _:
            return False
