"""The algebra of split axes: what ranks hold of an axis after a view, a slice, a concatenation, a repetition.

An answer is an axis, exactly right on all ranks, or the reason why there is none, in words for an error message. Code is run
on a single rank, 0 unless said: the others do the same, with their own sizes where it asks for sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd, prod

import numpy as np

from .axis_text import text
from .factors import (
    Alike,
    Axis,
    Factor,
    Parts,
    Whole,
    array_of,
    axis_of,
    canonical,
    entries_of,
    has_alike,
    holders,
    is_whole,
    local_of,
    local_size,
    num_ranks,
    padding,
    parts_in,
    parts_of,
    size_of,
    whole,
    without_alike,
)

Axes = tuple[Axis, ...]
"""The axes of a tensor."""

__all__ = [
    "Alike",
    "Axes",
    "Axis",
    "Factor",
    "Parts",
    "Whole",
    "axis_of",
    "canonical",
    "equal",
    "holders",
    "is_product",
    "is_whole",
    "join",
    "local_size",
    "meet",
    "padding",
    "parts_in",
    "repeat_each",
    "reshape",
    "size_of",
    "take",
    "tile",
    "whole",
]


def equal(a: Axis, b: Axis) -> bool:
    """Tell whether ranks hold the same of two axes."""
    return a == b


@lru_cache(maxsize=4096)
def meet(a: Axis, b: Axis) -> Axis | None:
    """Return what ranks hold of an axis that is worked on entry by entry, if they can hold the same of both operands.

    Where all entries of an operand are equal, it has any layout.

    >>> heads = Parts(4, ((0,), (1,), (2,), (3,)))
    >>> shared = Parts(2, ((0,), (0,), (1,), (1,)))
    >>> meet((heads,), (shared, Alike(2, 1))) == (heads,)
    True
    """
    if a == b:
        return a
    if size_of(a) != size_of(b) or local_size(a) != local_size(b):
        return None
    if _is_alike(a) or _is_alike(b):
        return b if _is_alike(a) else a
    if not has_alike(b):
        return b if has_alike(a) and _agrees(a, b) else None
    if not has_alike(a):
        return a if _agrees(b, a) else None
    return _meet_by_factor(a, b) or _meet_by_factor(b, a)


def _is_alike(axis: Axis) -> bool:
    return all(isinstance(factor, Alike) for factor in axis)


def _agrees(loose: Axis, exact: Axis) -> bool:
    """Tell whether each entry that a rank has of ``exact`` is among the equal entries that it has of ``loose``."""
    for rank in range(num_ranks(loose, exact)):
        if any(len(parts.held) <= rank for axis in (loose, exact) if (parts := parts_in(axis))):
            return False
        if local_size(loose, rank) != local_size(exact, rank):
            return False
        wanted = entries_of(exact, rank)
        is_free = wanted < 0
        number = np.arange(len(wanted))
        for factor in reversed(loose):
            wanted, of_whole = np.divmod(wanted, factor.size)
            number, at = np.divmod(number, max(local_of(factor, rank), 1))
            if isinstance(factor, Alike):
                continue
            own = at if isinstance(factor, Whole) else array_of(factor, rank)[at]
            if ((own != of_whole) & ~is_free).any():
                return False
    return True


def _meet_by_factor(a: Axis, b: Axis) -> Axis | None:
    cut = reshape((a,), [factor.size for factor in b], [local_of(factor, 0) for factor in b])
    if isinstance(cut, str):
        return None
    met = [meet(piece, (factor,)) for piece, factor in zip(cut, b, strict=True)]
    found = [piece for piece in met if piece is not None]
    if len(found) < len(met) or sum(parts_in(piece) is not None for piece in found) > 1:
        return None  # two factors shared out over the same ranks: most entries would be on none
    return canonical(factor for piece in found for factor in piece)


def reshape(axes: Axes, shape: Sequence[int], local_shape: Sequence[int], rank: int = 0) -> Axes | str:
    """Return the axes of a view.

    Args:
        axes: Axes of the tensor.
        shape: Shape of the view of the whole tensor.
        local_shape: Shape of the view on ``rank``.
        rank: The rank on which the local code ran.

    >>> rows = (Parts(2, ((0,), (1,))), Whole(2048))
    >>> reshape((rows,), (32, 128), (16, 128))
    ((Parts(size=2, held=((0,), (1,))), Whole(size=16)), (Whole(size=128),))
    >>> reshape((rows,), (32, 128), (32, 64))
    'each rank has 16 of 32 entries there, and the code makes 32 of 32'
    """
    sizes = [(size_of(axis), local_size(axis, rank)) for axis in axes]
    if sizes == list(zip(shape, local_shape, strict=True)):
        return axes
    shared = [parts for axis in axes if (parts := parts_in(axis))]
    if len(shared) > 1 or any(parts.size == 1 for parts in shared):
        return "two of its axes are shared out" if len(shared) > 1 else "a single entry of it is shared out"
    if prod(map(size_of, axes)) != prod(shape) or prod(local_size(axis, rank) for axis in axes) != prod(local_shape):
        return f"the shape {list(shape)}, locally {list(local_shape)}, has not as many entries"
    if not prod(shape) or not prod(local_shape):
        return _reshape_empty(axes, shape, local_shape, rank)
    found = _walk(axes, shape, local_shape, rank)
    if isinstance(found, str) and any(map(has_alike, axes)):
        certain = tuple(map(without_alike, axes))
        other = found if certain == axes else _walk(certain, shape, local_shape, rank)
        return found if isinstance(other, str) else other
    return found


def _reshape_empty(axes: Axes, shape: Sequence[int], local_shape: Sequence[int], rank: int) -> Axes | str:
    """Return the axes of a view without entries: those that are whole, and those that were there."""
    if prod(shape):
        return f"rank {rank} has no entries of it"
    known = {(size_of(axis), local_size(axis, rank)): axis for axis in axes}
    pairs = list(zip(shape, local_shape, strict=True))
    if any(size != local and (size, local) not in known for size, local in pairs):
        return "it has no entries"
    return tuple(whole(size) if size == local else known[size, local] for size, local in pairs)


def _walk(axes: Axes, shape: Sequence[int], local_shape: Sequence[int], rank: int) -> Axes | str:
    left: list[Factor] = list(reversed(canonical(factor for axis in axes for factor in axis)))
    found: list[Axis] = []
    for number, (size, local) in enumerate(zip(shape, local_shape, strict=True)):
        taken: list[Factor] = []
        need, local_need = size, local
        while (need, local_need) != (1, 1) and left:
            factor = left.pop()
            piece, rest = _cut(factor, need, local_need)
            if piece is None:
                if need > 1:
                    return _why_not_cut(axes, shape, number)
                left.append(factor)
                break
            taken.append(piece)
            if rest is not None:
                left.append(rest)
            need //= piece.size
            local_need = local_need // local_of(piece, rank) if local_need % local_of(piece, rank) == 0 else 0
        axis = canonical(taken)
        if local_size(axis, rank) != local:
            return f"each rank has {local_size(axis, rank)} of {size} entries there, and the code makes {local} of {size}"
        found.append(axis)
    assert not left, "the shape has as many entries"
    return tuple(found)


def _cut(factor: Factor, need: int, local_need: int) -> tuple[Factor | None, Factor | None]:
    """Return the next factor of a new axis that lacks ``need`` entries, and what is left of the old factor."""
    match factor:
        case Alike(size, local):
            if need % size == 0 and local_need % local == 0:
                return factor, None
            if size % need == 0 and local_need and local % local_need == 0:
                return Alike(need, local_need), Alike(size // need, local // local_need)
        case Whole(size):
            if need % size == 0:
                return factor, None
            if size % need == 0 and need > 1:
                return Whole(need), Whole(size // need)
        case Parts(size):
            if need % size == 0:
                return factor, None
    return None, None


def _why_not_cut(axes: Axes, shape: Sequence[int], number: int) -> str:
    for place, axis in enumerate(axes):
        if (parts := parts_in(axis)) is not None:
            unit = prod(factor.size for factor in axis[axis.index(parts) + 1 :])
            new, rest = divmod(prod(shape[number + 1 :]), prod(map(size_of, axes[place + 1 :])))
            if not rest and new != unit:
                return f"its entries are shared out in units of {unit}, and here in units of {new}"
    return f"{', '.join(map(text, axes))} cannot be seen as {', '.join(map(str, shape))}"


def is_product(axes: Axes, shape: Sequence[int], local_shape: Sequence[int], rank: int = 0) -> bool:
    """Tell whether ranks hold some entries along each of several new axes, into which a view cuts a split axis.

    Such a layout may be right, and no axis of it has a type: groups are shared out, and two ranks share a group's heads.
    """
    at = next((n for n, axis in enumerate(axes) if parts_in(axis) is not None), None)
    if at is None:
        return False
    split, before = axes[at], prod(size_of(axis) for axis in axes[:at])
    start = next((n for n in range(len(shape) + 1) if prod(shape[:n]) == before), None)
    stops = range(len(shape) + 1) if start is None else range(start + 1, len(shape) + 1)
    stop = next((n for n in stops if start is not None and prod(shape[start:n]) == size_of(split)), None)
    if start is None or stop is None or prod(local_shape[start:stop]) != local_size(split, rank):
        return False
    for place in range(num_ranks(split)):
        own = entries_of(split, place)
        if len(own) != local_size(split, rank) or (own < 0).any() or (own >= size_of(split)).any():
            return False
        places = np.unravel_index(own.reshape(local_shape[start:stop]), tuple(shape[start:stop]))
        for along, each in enumerate(places):
            others = (axis for axis in range(stop - start) if axis != along)
            if any((np.diff(each, axis=axis) != 0).any() for axis in others):
                return False
    return True


def take(axis: Axis, start: int, stop: int, local_start: int, local_stop: int, rank: int = 0) -> Axis | str:
    """Return what ranks have of consecutive entries of an axis.

    Args:
        axis: The axis.
        start: The first entry that the whole code takes.
        stop: The end (exclusive).
        local_start: The first entry that the local code takes, among those of ``rank``.
        local_stop: The end (exclusive).
        rank: The rank on which the local code ran.

    >>> fused = (Whole(2), Parts(2, ((0,), (1,))), Whole(8))
    >>> take(fused, 16, 32, 8, 16)
    (Parts(size=2, held=((0,), (1,))), Whole(size=8))
    >>> take(fused, 0, 8, 0, 8)
    'rank 1 has none of entries 0 to 8, and the code takes its entries 0 to 8'
    """
    wanted, local = (start, stop), (local_start, local_stop)
    if wanted == (0, size_of(axis)) and local == (0, local_size(axis, rank)):
        return axis
    if start == stop:
        return whole(0) if local_start == local_stop else f"the code takes {_span(local)}, and none of the whole"
    if is_whole(axis):
        return (
            whole(stop - start)
            if wanted == local
            else f"the whole code takes {_span(wanted)}, the local code {_span(local)}"
        )
    if _is_alike(axis):
        if local_start == local_stop:
            return f"the local code takes none of {_span(wanted)}"
        return canonical([Alike(stop - start, local_stop - local_start)])
    return _take_outer(axis, wanted, local, rank) if has_alike(axis) else _take_parts(axis, wanted, local, rank)


def _span(span: tuple[int, int]) -> str:
    return f"entries {span[0]} to {span[1]}"


def _take_outer(axis: Axis, wanted: tuple[int, int], local: tuple[int, int], rank: int) -> Axis | str:
    """Take entries of an axis along the outer factors, all of them along the innermost, if they can be taken so."""
    *outer, inner = axis
    size, own = inner.size, local_of(inner, rank)
    is_even = all(local_of(inner, other) == own for other in range(num_ranks(axis)))
    if outer and own and is_even and not any(bound % size for bound in wanted) and not any(bound % own for bound in local):
        found = take(tuple(outer), wanted[0] // size, wanted[1] // size, local[0] // own, local[1] // own, rank)
        return found if isinstance(found, str) else canonical((*found, inner))
    certain = without_alike(axis)
    if has_alike(certain):
        return f"{_span(wanted)} are a part of entries that are repeated"
    return take(certain, *wanted, *local, rank)


def _take_parts(axis: Axis, wanted: tuple[int, int], local: tuple[int, int], rank: int) -> Axis | str:
    inner = axis[-1].size if isinstance(axis[-1], Whole) else 1
    unit = gcd(inner, *wanted, *local)
    units = canonical((*axis[:-1], Whole(inner // unit))) if inner > 1 else axis
    start, stop = wanted[0] // unit, wanted[1] // unit
    lengths = [local_size(units, number) for number in range(num_ranks(units))]
    held: list[np.ndarray] = []
    for number, length in enumerate(lengths):
        entries = entries_of(units, number)
        is_wanted = (entries >= start) & (entries < stop)
        places = np.flatnonzero(is_wanted)
        fitting = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        low, high = (
            _bound(bound, of_whole, fit, (length, lengths[rank]), size_of(units))
            for bound, of_whole, fit in zip((local[0] // unit, local[1] // unit), (start, stop), fitting, strict=True)
        )
        high = max(low, high)
        taken = entries[low:high]
        if is_wanted.sum() != is_wanted[low:high].sum() or (~is_wanted[low:high] & (taken >= 0)).any():
            are_together = len(places) == fitting[1] - fitting[0]
            return _why_not_taken(
                number, wanted, (low * unit, high * unit), (fitting[0] * unit, fitting[1] * unit), are_together=are_together
            )
        held.append(np.where(taken < 0, -1, taken - start))
    return canonical([parts_of(stop - start, held), Whole(unit)])


def _bound(bound: int, of_whole: int, fitting: int, sizes: tuple[int, int], size: int) -> int:
    """Return where a rank begins or ends, if ``rank`` does at ``bound`` and the whole at ``of_whole``.

    Ranks do the same where they have equally many entries. Where not, a number that is also the whole's is a constant, the
    end is the end, and anything else is a size that each rank has in its own way.
    """
    length, own_length = sizes
    if of_whole == size and bound == own_length:
        return length
    if bound == of_whole:
        return min(bound, length)
    return bound if length == own_length else fitting


def _why_not_taken(
    rank: int, wanted: tuple[int, int], local: tuple[int, int], fitting: tuple[int, int], *, are_together: bool
) -> str:
    if not are_together:
        return f"the {_span(wanted)} of the whole are not next to each other on rank {rank}"
    if fitting[0] == fitting[1]:
        return f"rank {rank} has none of {_span(wanted)}, and the code takes its {_span(local)}"
    return f"{_span(wanted)} are {_span(fitting)} on rank {rank}, as far as it has them, and the code takes {_span(local)}"


def join(axes: Sequence[Axis]) -> Axis | str:
    """Return the axis along which others are concatenated.

    >>> rows = (Parts(2, ((0,), (1,))), Whole(8))
    >>> join([rows, rows])
    (Whole(size=2), Parts(size=2, held=((0,), (1,))), Whole(size=8))
    >>> join([rows, whole(4)])
    '16@tensor is split, and 4, joined to it, is whole'
    """
    axes = [axis for axis in axes if axis != (Whole(0),)]
    if not axes:
        return whole(0)
    if len(set(axes)) == 1:
        return canonical((Whole(len(axes)), *axes[0]))
    axes = [_in_the_layout_of(axes, axis) for axis in axes]
    if any(map(has_alike, axes)):
        return "the ranks have some of entries that are all equal, and it is open which"
    if all(map(is_whole, axes)):
        return whole(sum(map(size_of, axes)))
    for axis in axes:
        if is_whole(axis):
            split = next(other for other in axes if not is_whole(other))
            return f"{text(split)} is split, and {text(axis)}, joined to it, is whole"
    unit = gcd(*(axis[-1].size if isinstance(axis[-1], Whole) else 1 for axis in axes))
    units = [canonical((*axis[:-1], Whole(axis[-1].size // unit))) if unit > 1 else axis for axis in axes]
    starts = np.cumsum([0, *map(size_of, units)])
    held: list[np.ndarray] = []
    for rank in range(num_ranks(*axes)):
        entries = [entries_of(axis, rank) for axis in units]
        held.append(np.concatenate([np.where(own < 0, -1, own + at) for own, at in zip(entries, starts, strict=False)]))
    return canonical([parts_of(int(starts[-1]), held), Whole(unit)])


def _in_the_layout_of(others: Sequence[Axis], axis: Axis) -> Axis:
    """Return an axis in a layout without equal entries, if there is one: that of an equally long one, or whole."""
    certain = without_alike(axis)
    if not has_alike(certain):
        return certain
    even = [other for other in others if not has_alike(other) and _is_even(other)]  # else ranks may have another number
    return next((found for other in even if (found := meet(certain, other)) is not None), certain)


def _is_even(axis: Axis) -> bool:
    return len({local_size(axis, rank) for rank in range(num_ranks(axis))}) == 1


def repeat_each(axis: Axis, num: int, local_num: int) -> Axis:
    """Return an axis with each entry several times in a row."""
    return canonical((*axis, Alike(num, local_num)))


def tile(axis: Axis, num: int) -> Axis:
    """Return an axis several times, one after another."""
    return canonical((Alike(num, num), *axis))
