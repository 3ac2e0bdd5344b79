"""Views of memory that was changed through another view of it."""

from __future__ import annotations

from attrs import evolve

from .axes import Alike, Axis, parts_in
from .held import Held, lost


def written(old: Held, changed: Held, rank: int) -> Held:
    """Return what ranks hold of a view, after another view of the same memory was changed.

    Memory in which all entries are equal along an axis takes the layout there of what is written into it.

    Args:
        old: What they held of the view.
        changed: What they hold of the other view.
        rank: The rank whose sizes the two have.
    """
    if old.is_plain and changed.is_plain:
        return evolve(old, fill=None)
    if old.is_plain and changed.kind == "parts":
        return lost("each rank has written its own entries to the same places of it", is_wrong=True)
    is_open = old.is_due or changed.is_due or old.is_drawn or changed.is_drawn
    made = None if is_open else _taking_layout(old, changed, rank)
    return made or lost("its memory was changed through a view, with what is shared out in another way")


def _taking_layout(old: Held, changed: Held, rank: int) -> Held | None:
    if changed.kind == "summand":
        is_sum = old.kind == "summand" or (old.fill == 0 and old.is_plain)
        return evolve(old, kind="summand", fill=None) if is_sum else None
    free, others = ([axis for axis in held.axes if _is_free(axis)] for held in (old, changed))
    if old.kind == changed.kind == "whole" and free == others != []:
        return evolve(old, fill=None)
    split = [axis for axis in changed.axes if parts_in(axis) is not None]
    if old.kind != "whole" or changed.kind != "parts" or others or len(split) != 1:
        return None
    axes = tuple(split[0] if _is_free(axis) else axis for axis in old.axes)
    made = evolve(old, kind="parts", axes=axes, fill=None)
    is_one = sum(map(_is_free, old.axes)) == 1
    return made if is_one and (made.shape, made.local_shape(rank)) == (old.shape, old.local_shape(rank)) else None


def _is_free(axis: Axis) -> bool:
    return len(axis) == 1 and isinstance(axis[0], Alike) and axis[0].size != axis[0].local
