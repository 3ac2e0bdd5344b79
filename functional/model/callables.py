"""Functions by name: how a plan, which is data, refers to functions of the user."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from frozendict import frozendict

from ...specs.errors import PlanError, Problem


def register(callables: Mapping[str, Any], function: Callable[..., Any]) -> tuple[str, frozendict[str, Any]]:
    """Return the name of a function, and the callables with it.

    The name is ``module:qualname`` if importing that name gives the function. Any other function gets a name with a ``<``
    in it, which tells ``dumps`` that it cannot be saved; two different functions never share a name.

    >>> import math
    >>> register({}, math.sqrt)[0]
    'math:sqrt'
    >>> register({}, lambda x: x)[0].endswith("<lambda>")
    True
    """
    name = _name(function)
    unique, count = name, 1
    while callables.get(unique, function) is not function:
        count += 1
        unique = f"{name}<{count}>"
    return unique, frozendict({**callables, unique: function})


def find_callable(name: str, callables: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function of a name: from the plan's callables, else by import.

    Raises:
        PlanError: If it cannot be imported.
    """
    if name in callables:
        return callables[name]
    try:
        return _import(name)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "Put its module on PYTHONPATH, or plan again in this process"
        raise PlanError([Problem(name, f"the plan calls this function, and it cannot be imported: {error}", fix)]) from error


def missing_callables(names: Iterable[str], callables: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over the problems of functions that cannot be found by their names."""
    for name in names:
        try:
            find_callable(name, callables)
        except PlanError as error:
            yield from error.problems


def _name(function: Callable[..., Any]) -> str:
    module = getattr(function, "__module__", None) or type(function).__module__
    qualname = getattr(function, "__qualname__", None)
    if qualname is None:
        return f"{module}:<{type(function).__qualname__} object>"
    name = f"{module}:{qualname}"
    try:
        same = _import(name) is function
    except (ImportError, AttributeError, ValueError):
        same = False
    return name if same or "<" in name else f"{module}:<{qualname}>"


def _import(name: str) -> Any:
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
