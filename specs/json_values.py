"""Plain values, which JSON can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from frozendict import deepfreeze, frozendict

if TYPE_CHECKING:
    from attrs import Attribute


WRITTEN_IF_SET = {"written": "if set"}
"""Metadata of an attrs field that is written to JSON only where it is not its default: older records lack it."""

NEVER_WRITTEN = {"written": "never"}
"""Metadata of an attrs field that JSON cannot hold."""


def is_plain(value: object) -> bool:
    """Tell whether a value is made of finite numbers, strings, booleans, None, lists and dictionaries with string keys.

    >>> is_plain({"heads": [1, 2]}), is_plain({"heads": object()}), is_plain({1: 2})
    (True, False, False)
    """
    return next(not_plain("", value), None) is None


def not_plain(path: str, value: object) -> Iterator[tuple[str, object]]:
    """Iterate over the parts of a value that JSON cannot hold, each with its path.

    >>> list(not_plain("config", {"steps": [1, float("inf")]}))
    [('config.steps[1]', inf)]
    """
    match value:
        case None | bool() | int() | str():
            pass
        case float() if isfinite(value):
            pass
        case list() | tuple():
            for place, item in enumerate(cast("list[Any]", value)):
                yield from not_plain(f"{path}[{place}]", item)
        case Mapping():
            for key, item in cast("Mapping[Any, Any]", value).items():
                if isinstance(key, str):
                    yield from not_plain(f"{path}.{key}", item)
                else:
                    yield path, key
        case _:
            yield path, value


def check_plain(_: object, attribute: Attribute[Any], value: object) -> None:
    """Validate an attrs field: raise ValueError for a value that is not plain."""
    if not is_plain(value):
        msg = f"{attribute.name}: a plan holds plain, finite JSON values, not {value!r}"
        raise ValueError(msg)


def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(_: object, attribute: Attribute[Any], value: object) -> None:
    """Raise TypeError if a record is given anything but an integer: an attrs validator, to which True is none."""
    if not is_integer(value):
        msg = f"{attribute.name} is an integer, not {value!r}"
        raise TypeError(msg)


def to_plain(value: Any) -> Any:
    """Write a number that JSON has not, or does not tell from another, as a dictionary; everything else stays.

    >>> to_plain(float("-inf")), to_plain(0.5)
    (frozendict.frozendict({'float': '-inf'}), 0.5)
    """
    if isinstance(value, Mapping):
        return deepfreeze(dict(cast("Mapping[str, Any]", value)))
    if isinstance(value, float) and (not isfinite(value) or str(value) == "-0.0"):
        written: frozendict[str, str] = frozendict({"float": repr(value)})
        return written
    return value


def to_argument(value: Any) -> Any:
    """Write an argument of an operator, to which 200 and 200.0 are two things.

    >>> to_argument(200.0), to_argument(200), to_argument(0.5)
    (frozendict.frozendict({'float': '200.0'}), 200, 0.5)
    """
    if isinstance(value, float) and value.is_integer():
        written: frozendict[str, str] = frozendict({"float": repr(value)})
        return written
    return to_plain(value)


def from_plain(value: Any) -> Any:
    """Undo ``to_plain``.

    >>> from_plain(to_plain(float("-inf")))
    -inf
    """
    match value:
        case {"float": str() as written}:
            return float(written)
        case _:
            return value


def thawed(value: Any) -> Any:
    """Return a frozen plain value as lists and dictionaries, as other libraries expect.

    >>> thawed(frozendict(steps=(1, 2)))
    {'steps': [1, 2]}
    """
    match value:
        case Mapping():
            return {name: thawed(item) for name, item in cast("Mapping[str, Any]", value).items()}
        case list() | tuple():
            return [thawed(item) for item in cast("list[Any]", value)]
        case _:
            return value
