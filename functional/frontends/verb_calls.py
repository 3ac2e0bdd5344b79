"""Calls of verbs, path by path, applied to all layers at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...specs.verb_call import Options, VerbCall, patterns, wildcard

if TYPE_CHECKING:
    from ..schedule import Schedule


def apply_all(sch: Schedule, calls: Iterable[VerbCall]) -> Schedule:
    """Return the schedule with all calls applied; calls that differ only in the number of a layer are applied at once."""
    groups: dict[tuple[str, str, tuple[object, ...], Options], dict[str, None]] = {}
    for call in calls:
        key = wildcard(call.path), call.verb, call.args, call.options
        groups.setdefault(key, {})[call.path] = None
    known = [*(path for module in sch.modules for path in (module.path, *module.aliases)), *sch.tree.all_paths]
    for (_, verb, args, options), paths in groups.items():
        for selection in patterns(list(paths), known):
            sch = getattr(sch.at[selection], verb)(*args, **dict(options))
    return sch
