"""Calls of verbs, path by path, and the patterns that apply a call to all layers at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from attrs import frozen

from ...specs.pattern import compile_pattern

if TYPE_CHECKING:
    from ..schedule import Schedule

Options = tuple[tuple[str, object], ...]
"""Keyword arguments of a verb, in order."""


@frozen
class VerbCall:
    """A call of a verb on a path.

    Args:
        path: Module or tensor.
        verb: Name of a method of ``Schedule``.
        args: Its positional arguments.
        options: Its keyword arguments.
    """

    path: str
    verb: str
    args: tuple[object, ...] = ()
    options: Options = ()


def apply_all(sch: Schedule, calls: Iterable[VerbCall]) -> Schedule:
    """Return the schedule with all calls applied; calls that differ only in the number of a layer are applied at once."""
    groups: dict[tuple[str, str, tuple[object, ...], Options], dict[str, None]] = {}
    for call in calls:
        key = wildcard(call.path), call.verb, call.args, call.options
        groups.setdefault(key, {})[call.path] = None
    known = [*(path for module in sch.modules for path in (module.path, *module.aliases)), *sch.tree.all_paths]
    for (pattern, verb, args, options), paths in groups.items():
        for selection in _patterns(pattern, list(paths), known):
            sch = getattr(sch.at[selection], verb)(*args, **dict(options))
    return sch


def wildcard(path: str) -> str:
    """Return the path with ``*`` for numbers of layers, as the plans of transformers name them.

    >>> wildcard("model.layers.12.mlp.experts.3.w1"), wildcard("lm_head")
    ('model.layers.*.mlp.experts.*.w1', 'lm_head')
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _patterns(pattern: str, paths: list[str], known: list[str]) -> list[str]:
    """Return patterns that select these paths, and no other known path: a single pattern where possible."""
    if "*" not in pattern or len(paths) == 1:
        return paths
    matches = compile_pattern(pattern).fullmatch
    if all(path in paths for path in known if matches(path)):
        return [pattern]
    names = [path.split(".") for path in paths]
    varying = [place for place, column in enumerate(zip(*names, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return paths
    (place,) = varying
    numbers = ",".join(parts[place] for parts in names)
    return [".".join([*names[0][:place], f"{{{numbers}}}", *names[0][place + 1 :]])]
