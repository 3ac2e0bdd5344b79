"""An axis of a tensor as a product of factors, one of which may be shared out over the ranks along ``tensor``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import gcd, prod
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import field, frozen

if TYPE_CHECKING:
    from ...specs.mesh import Mesh
    from ...specs.shard import Shard

    Entries = np.ndarray[tuple[int], np.dtype[np.int64]]
    """Entries of a factor or axis, in the order of a rank."""


@frozen
class Whole:
    """A factor that every rank has entirely.

    Args:
        size: Its entries.
    """

    size: int


def _tuples(held: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, held))


@frozen(cache_hash=True)
class Parts:
    """A factor whose entries are shared out over the ranks along ``tensor``.

    Args:
        size: Entries in all, without padding.
        held: For each rank, the entries that it has, in its order. An entry of ``size`` or more is padding.
    """

    size: int
    held: tuple[tuple[int, ...], ...] = field(converter=_tuples)


@frozen
class Alike:
    """A factor along which all entries of the tensor are equal, so that ranks may have any number of them.

    Args:
        size: Entries of the whole.
        local: Entries of each rank.
    """

    size: int
    local: int


Factor = Whole | Parts | Alike

Axis = tuple[Factor, ...]
"""An axis: entry (i, j, ...) of its factors, the slowest first. Canonical; ``()`` for an axis of one entry.

At most one factor is :class:`Parts`. It has no whole factor left in it: not within (ranks have runs of g entries) and not
around it (they have the same of each of m blocks). So 4096 rows over two ranks are ``Parts(2, ((0,), (1,)))`` and
``Whole(2048)``, and are seen as 32 heads of 128 by arithmetic.
"""


def axis_of(shard: Shard, size: int, mesh: Mesh) -> Axis:
    """Return an axis of ``size`` entries that is split by ``shard``.

    >>> from shardplan.specs import Mesh, Shard
    >>> axis_of(Shard(axis=0, blocks=(8, 8)), 16, Mesh(tensor=2))
    (Whole(size=2), Parts(size=2, held=((0,), (1,))), Whole(size=4))
    """
    return _axis_of(shard, size, mesh)


@lru_cache(maxsize=4096)
def _axis_of(shard: Shard, size: int, mesh: Mesh) -> Axis:
    if size == 0:
        return whole(0)
    runs: list[list[tuple[int, int]]] = []
    num_padding = 0
    for place in range(mesh.num(shard.mesh_axis)):
        coordinate = mesh.at(**{shard.mesh_axis: place})
        runs.append(list(shard.intervals(size, coordinate)))
        missing = shard.length(size, coordinate) - sum(stop - start for start, stop in runs[-1])
        if missing:
            runs[-1].append((size + num_padding, size + num_padding + missing))
            num_padding += missing
    if all(own == [(0, size)] for own in runs):
        return whole(size)
    unit = gcd(size, *(bound for own in runs for run in own for bound in run))
    held = [[entry for start, stop in own for entry in range(start // unit, stop // unit)] for own in runs]
    return canonical([Parts(size // unit, held), Whole(unit)])


def whole(size: int) -> Axis:
    """Return an axis that every rank has entirely."""
    return canonical([Whole(size)])


def size_of(axis: Axis) -> int:
    """Return the entries of an axis in all, without padding."""
    return prod(factor.size for factor in axis)


def local_size(axis: Axis, rank: int = 0) -> int:
    """Return the entries of an axis that a rank has, padding counted."""
    return prod(local_of(factor, rank) for factor in axis)


def local_of(factor: Factor, rank: int) -> int:
    """Return the entries of a factor that a rank has, padding counted."""
    match factor:
        case Whole(size):
            return size
        case Parts(_, held):
            return len(held[rank])
        case Alike(_, local):
            return local


def is_whole(axis: Axis) -> bool:
    """Tell whether every rank has all entries, each in its place."""
    return all(isinstance(factor, Whole) for factor in axis)


def parts_in(axis: Axis) -> Parts | None:
    """Return the factor that is shared out, None if there is none."""
    return next((factor for factor in axis if isinstance(factor, Parts)), None)


def num_ranks(*axes: Axis) -> int:
    """Return the number of ranks, as far as it matters to some axes: 1 where none is shared out."""
    return max((len(parts.held) for axis in axes if (parts := parts_in(axis))), default=1)


def has_alike(axis: Axis) -> bool:
    """Tell whether entries are known to be equal along a factor."""
    return any(isinstance(factor, Alike) for factor in axis)


def without_alike(axis: Axis) -> Axis:
    """Forget that entries are equal, where each rank has as many as the whole."""
    return canonical(
        Whole(factor.size) if isinstance(factor, Alike) and factor.size == factor.local else factor for factor in axis
    )


@lru_cache(maxsize=4096)
def holders(axis: Axis) -> Literal["once", "repeated"]:
    """Return ``once`` if each entry is on a single rank, ``repeated`` if some are on several, as in whole axes."""
    parts = parts_in(axis)
    if parts is None:
        return "repeated"
    entries = _flat(parts)
    entries = entries[entries < parts.size]
    return "once" if len(np.unique(entries)) == len(entries) else "repeated"


def padding(axis: Axis) -> bool:
    """Tell whether a rank has padding."""
    parts = parts_in(axis)
    return parts is not None and bool((_flat(parts) >= parts.size).any())


def entries_of(axis: Axis, rank: int) -> Entries:
    """Return the entries of an axis that a rank has, in its order; -1 for padding. Of equal entries it is the first."""
    found = np.zeros(1, np.int64)
    for factor in axis:
        match factor:
            case Whole(size):
                own = np.arange(size)
            case Parts(size):
                own = array_of(factor, rank)
                own = np.where(own < size, own, -1)
            case Alike(_, local):
                own = np.zeros(local, np.int64)
        pair = found[:, None] * factor.size + own[None, :]
        found = np.where((found[:, None] < 0) | (own[None, :] < 0), -1, pair).reshape(-1)
    return found


def parts_of(size: int, held: Sequence[Entries]) -> Parts:
    """Return the factor whose entries are as given for each rank, -1 for padding."""
    numbered: list[tuple[int, ...]] = []
    num_padding = 0
    for own in held:
        is_padding = own < 0
        named = np.where(is_padding, size + num_padding + np.cumsum(is_padding) - 1, own)
        num_padding += int(is_padding.sum())
        numbered.append(tuple(named.tolist()))
    return Parts(size, tuple(numbered))


@lru_cache(maxsize=1024)
def array_of(parts: Parts, rank: int) -> Entries:
    """Return the entries that a rank has, as an array."""
    return np.array(parts.held[rank], np.int64)


def _flat(parts: Parts) -> Entries:
    return np.concatenate([array_of(parts, rank) for rank in range(len(parts.held))])


def canonical(factors: Iterable[Factor]) -> Axis:
    """Return the canonical form of an axis with these factors, at most one of them shared out.

    >>> canonical([Whole(3), Parts(4, ((0, 1), (2, 3))), Whole(2), Whole(5)])
    (Whole(size=3), Parts(size=2, held=((0,), (1,))), Whole(size=20))
    """
    found: list[Factor] = []
    for factor in factors:
        for piece in _pieces(factor) if isinstance(factor, Parts) else (factor,):
            match found[-1] if found else None, piece:
                case _, Whole(1) | Alike(1, 1):
                    pass
                case _, Whole(0) | Alike(0, 0):
                    return (Whole(0),)
                case Whole(), Parts(1, held) if max(map(len, held)) == 1:
                    found.insert(-1, piece)  # ranks have all or nothing: the same wherever it stands
                case Whole(outer), Whole(inner):
                    found[-1] = Whole(outer * inner)
                case Alike(outer, outer_local), Alike(inner, inner_local):
                    found[-1] = Alike(outer * inner, outer_local * inner_local)
                case _:
                    found.append(piece)
    assert sum(isinstance(factor, Parts) for factor in found) <= 1, "two factors of an axis are shared out"
    return tuple(found)


@lru_cache(maxsize=1024)
def _pieces(parts: Parts) -> Axis:
    """Take the largest whole factors out of a factor: around it, and within it."""
    size, ranks = parts.size, range(len(parts.held))
    if size == 0:
        return (parts,) if any(parts.held) else (Whole(0),)
    held = [array_of(parts, rank) for rank in ranks]
    if all(len(own) == size and (own == np.arange(size)).all() for own in held):
        return (Whole(size),)
    numbered = parts_of(size, [np.where(own < size, own, -1) for own in held])
    held = [array_of(numbered, rank) for rank in ranks]
    unit = _unit(size, held)
    size, held = size // unit, [own[::unit] // unit for own in held]
    held = [np.where(own < size, own, -1) for own in held]
    num = _num_blocks(size, held)
    inner = parts_of(size // num, [own[: len(own) // num] for own in held])
    return tuple(factor for factor in (Whole(num), inner, Whole(unit)) if factor != Whole(1))


def _unit(size: int, held: Sequence[Entries]) -> int:
    """Return the largest number of entries that always stand together, in order: what divides the bounds of all runs."""
    unit = size
    for own in held:
        ends = np.flatnonzero(np.diff(own) != 1)
        bounds = np.concatenate([own[:1], own[ends] + 1, own[ends + 1], own[-1:] + 1])
        unit = gcd(unit, int(np.gcd.reduce(bounds)) if len(bounds) else 0)
    return unit


def _num_blocks(size: int, held: Sequence[Entries]) -> int:
    """Return the largest number of equal blocks of each of which ranks have the same."""
    common = gcd(size, *map(len, held))
    return next(num for num in range(common, 0, -1) if common % num == 0 and all(_repeats(own, size, num) for own in held))


def _repeats(own: Entries, size: int, num: int) -> bool:
    rows = own.reshape(num, -1)
    shifted = rows[0] + np.arange(num)[:, None] * (size // num)
    return bool((np.where(rows[0] < 0, -1, shifted) == rows).all())
