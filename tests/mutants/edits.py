"""Edits of a schedule's record, of which changes are made: of layout steps and of splits, in one layer or in all layers."""

from __future__ import annotations

import re
from collections.abc import Callable

from attrs import evolve, frozen

from shardplan.functional.schedule import Schedule
from shardplan.specs.paths import join, module_of, name_of

KINDS = {}
"""All kinds of change by name, in the order in which they are declared: ``(schedule, rng) -> Mutation | None``."""


@frozen
class Mutation:
    """A changed schedule.

    Args:
        schedule: The schedule after the change.
        places: Paths of the modules and tensors that the change is about, before and after it.
        description: The change in words.
    """

    schedule: Schedule
    places: tuple[str, ...]
    description: str


def kind(name):
    """Register a kind of change: the decorated function."""

    def register(change: Callable):
        assert name not in KINDS, f"two kinds are named {name!r}"
        KINDS[name] = change
        return change

    return register


def chosen(rng, items):
    """Return one of some items, None if there are none."""
    items = list(items)
    return rng.choice(items) if items else None


def change_steps(sch, rng, is_wanted, edit):
    """Change a layout step, and with even chances all steps like it in further layers.

    Args:
        sch: The schedule.
        rng: The random generator.
        is_wanted: Tells whether a step can be changed.
        edit: A function ``step -> steps`` that stand in its place; None if this step cannot be changed so.
    """
    first = chosen(rng, filter(is_wanted, _effective(sch)))
    if first is None or (became := edit(first)) is None:
        return None
    is_everywhere = rng.random() < 0.5 and any(_in_general(s) == _in_general(first) for s in sch.layout if s != first)
    steps, places = [], []
    for step in sch.layout:
        is_meant = step == first or (is_everywhere and is_wanted(step) and _in_general(step) == _in_general(first))
        after = edit(step) if is_meant else None
        steps += [step] if after is None else after
        places += [] if after is None else _places(step, after)
    told = f"{_told(first)} → {'; '.join(map(_told, became)) or 'nothing'}{', in all layers' if is_everywhere else ''}"
    return finished(sch, evolve(sch, layout=tuple(steps)), places, told)


def change_specs(sch, rng, is_wanted, edit, *, together=True):
    """Change the splits of a tensor, with even chances those of its module alike, and those of all layers alike.

    Args:
        sch: The schedule.
        rng: The random generator.
        is_wanted: Tells whether a tensor can be changed.
        edit: A function ``spec -> shards``; None if this tensor cannot be changed so.
        together: Whether weight and bias of a module may be changed at once.
    """
    wanted = [spec for spec in sch.tree.values() if is_wanted(spec)]
    first = chosen(rng, wanted)
    if first is None or edit(first) is None:
        return None
    is_together, is_everywhere = together and rng.random() < 0.5, rng.random() < 0.5
    same = {first.path, *(s.path for s in wanted if is_together and s.module == first.module)}
    if is_everywhere:
        patterns = {_in_general(path) for path in same}
        same |= {s.path for s in wanted if _in_general(s.path) in patterns}
    after = {path: shards for path in same if (shards := edit(sch.tree[path])) is not None}
    changed = {path: evolve(sch.tree[path], shards=shards) for path, shards in after.items()}
    tree = sch.tree.replace(changed)
    num = len(changed) - 1
    told = f"{_spelled(first, first)} → {_spelled(tree[first.path], first)}{f', and {num} more' if num else ''}"
    return finished(sch, evolve(sch, tree=tree), [path for spec in changed.values() for path in spec.paths], told)


def finished(before, after, places, description):
    """Return a mutation, None if the change leaves the schedule as it was."""
    if after == before or not places:
        return None
    return Mutation(after, tuple(dict.fromkeys(places)), description)


def elsewhere(sch, rng, path):
    """Return a function that maps a module's path to that of a module near it, None if there is none."""
    siblings = [m.path for m in sch.modules if m.path != path and module_of(m.path) == module_of(path)]
    children = [m.path for m in sch.modules if m.path and module_of(m.path) == path]
    near = chosen(rng, [*siblings, *children, *([module_of(path)] if module_of(path) else [])])
    if near is None:
        return None
    if near == module_of(path):
        return module_of
    if module_of(near) == path:
        return lambda old: join(old, name_of(near))
    return lambda old: join(module_of(old), name_of(near))


def _effective(sch):
    return [step for step in sch.layout if step.matters(sch.mesh)]


def _in_general(thing):
    """Return a path or a step with the numbers of layers left out."""
    if isinstance(thing, str):
        return re.sub(r"\d+", "*", thing)
    return _in_general(thing.module), evolve(thing, module="")


def _places(step, after):
    named = [join(s.module, getattr(s, "name", "")) if hasattr(s, "name") else s.module for s in (step, *after)]
    return [step.module, *named]


def _spelled(spec, named):
    """Return a tensor's type with the options of its splits that it does not show; its path before the change."""
    options = [f"{o}={getattr(shard, o)}" for shard in spec.shards for o in ("granule", "blocks") if getattr(shard, o) != 1]
    told = ", ".join(option for option in options if option != "blocks=()")
    return f"{f'{spec.path}  ' if spec is named else ''}{spec.type}{f' ({told})' if told else ''}"


def _told(step):
    numbers = [f"{name}={value}" for name in ("num_rows", "sizes") if (value := getattr(step, name, None)) is not None]
    more = f" ({', '.join(numbers)})" if numbers and not hasattr(step, "which") else ""
    return f"{step.module or '(model)'}: {step.describe()}{more}"
