"""Axes of activations as products of factors, such as heads times features of a head.

Operators show which factors are equal, and which factor is made of smaller factors; this then holds in all tensors with the
factor. A factor is a leaf, a product of factors (the first varies slowest), or a sum of consecutive blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Literal

from attrs import define

Axis = tuple["Factor", ...]
"""The factors of an axis, slowest first; an axis with a single entry has no factors."""

MISALIGNED = "it is laid out in another way further on"


@define(eq=False)
class Factor:
    """A factor of an axis.

    Args:
        size: Entries.
        reason: Why it cannot be split; empty if nothing speaks against it.
        is_picked: Whether single entries of it are picked, as q, k and v are from a joint axis.
        kind: Whether it is a leaf, or how it is made of its parts.
        parts: The smaller factors that it is made of.
        same: An equal factor that stands for it, once it is found.
    """

    size: int
    reason: str = ""
    is_picked: bool = False
    kind: Literal["leaf", "product", "sum"] = "leaf"
    parts: Axis = ()
    same: Factor | None = None


def representative(factor: Factor) -> Factor:
    """Return the factor that stands for all equal factors."""
    while factor.same is not None:
        factor = factor.same
    return factor


def spell(axis: Iterable[Factor]) -> Iterator[Factor]:
    """Iterate over the leaves and sums whose product an axis is."""
    for factor in map(representative, axis):
        if factor.kind == "product":
            yield from spell(factor.parts)
        elif factor.size != 1 or factor.kind == "sum":
            yield factor


def size_of(axis: Iterable[Factor]) -> int:
    """Return the entries of an axis."""
    return prod(factor.size for factor in axis)


def block(axis: Iterable[Factor], reason: str, *, is_picked: bool = False) -> None:
    """Note why the factors of an axis, and their parts, cannot be split; the first reason stays."""
    for factor in map(representative, axis):
        factor.is_picked = is_picked if not factor.reason else factor.is_picked and is_picked
        factor.reason = factor.reason or reason
        block(factor.parts, reason, is_picked=is_picked)


def unify(left: Iterable[Factor], right: Iterable[Factor]) -> None:
    """Note that two axes are equal, factor by factor."""
    ours, theirs = deque(spell(left)), deque(spell(right))
    while ours and theirs:
        a, b = _front(ours), _front(theirs)
        if a is None or b is None:
            continue
        if a.size == b.size:
            _merge(a, b)
            ours.popleft()
            theirs.popleft()
        elif a.size > b.size and _take_apart(a, b.size):
            _respell(ours)
        elif a.size < b.size and _take_apart(b, a.size):
            _respell(theirs)
        else:
            break
    block((*ours, *theirs), MISALIGNED)


def reshape(axes: Iterable[Axis], shape: Sequence[int]) -> list[Axis]:
    """Return the axes after a reshape to ``shape``."""
    if 0 in shape:
        return [unsplittable(size, "it is empty") for size in shape]
    pool = deque(spell(factor for axis in axes for factor in axis))
    made: list[Axis] = []
    for size in shape:
        taken: list[Factor] = []
        missing = size
        while missing > 1 and pool:
            first = _front(pool)
            if first is None:
                continue
            if missing % first.size == 0:
                taken.append(pool.popleft())
                missing //= first.size
            elif _take_apart(first, missing):
                _respell(pool)
            else:
                block((*taken, *pool), MISALIGNED)
                return [*made, *(unsplittable(left, MISALIGNED) for left in shape[len(made) :])]
        made.append(tuple(taken))
    return made


def unsplittable(size: int, reason: str) -> Axis:
    """Return an axis that cannot be split."""
    return (Factor(size, reason),) if size != 1 else ()


def part(axis: Axis, start: int, stop: int) -> Axis:
    """Return consecutive entries of an axis, which is taken apart into blocks there."""
    if (start, stop) == (0, size_of(axis)):
        return axis
    factors = list(spell(axis))
    first, rest = factors[0], factors[1:]
    inner = size_of(rest)
    if start % inner or stop % inner or not _cut(first, {start // inner, stop // inner}):
        block(axis, "a part of it is taken, across what it consists of")
        return unsplittable(stop - start, "it is a part of something whole")
    starts = accumulate((f.size for f in segments(first)), initial=0)
    taken = [f for at, f in zip(starts, segments(first), strict=False) if start <= at * inner < stop]
    return (*laid_out([(f,) for f in taken]), *rest)


def laid_out(blocks: Sequence[Axis]) -> Axis:
    """Return the axis made of consecutive blocks."""
    if len(blocks) == 1:
        return blocks[0]
    parts = tuple(_joined(axis) for axis in blocks)
    return (Factor(sum(f.size for f in parts), kind="sum", parts=parts),)


def segments(factor: Factor) -> Iterator[Factor]:
    """Iterate over the blocks of a factor, itself if it is no sum."""
    factor = representative(factor)
    if factor.kind != "sum":
        yield factor
        return
    for inner in factor.parts:
        yield from segments(inner)


def count(axis: Iterable[Factor], leaf: Factor) -> int:
    """Return how often a leaf is a factor of an axis, of each block of it; -1 if only of some blocks.

    >>> heads, features, other = Factor(4), Factor(8), Factor(32)
    >>> count((Factor(64, kind="sum", parts=laid_out([(heads, features), (heads, features)])),), heads)
    1
    >>> count(laid_out([(heads, features), (other,)]), heads)
    -1
    """
    total = 0
    for factor in map(representative, axis):
        if factor is leaf:
            total += 1
        elif factor.kind == "product":
            inner = count(factor.parts, leaf)
            if inner < 0:
                return -1
            total += inner
        elif factor.kind == "sum":
            found = {count((f,), leaf) for f in factor.parts}
            if len(found) > 1 or -1 in found:
                return -1
            total += found.pop()
    return total


def _front(pool: deque[Factor]) -> Factor | None:
    """Return the first factor; None if it has become a product and was replaced by its parts."""
    first = representative(pool[0])
    if first.kind == "product":
        _respell(pool)
        return None
    return first


def _respell(pool: deque[Factor]) -> None:
    pool.extendleft(reversed(list(spell([pool.popleft()]))))


def _joined(axis: Axis) -> Factor:
    if len(axis) == 1:
        return axis[0]
    return Factor(size_of(axis), kind="product" if axis else "leaf", parts=axis)


def _take_apart(factor: Factor, first: int) -> bool:
    """Make a leaf a product whose first factor has a size; tell whether this is possible."""
    if factor.kind != "leaf" or not first or factor.size % first:
        return False
    factor.kind = "product"
    factor.parts = tuple(Factor(size, factor.reason, factor.is_picked) for size in (first, factor.size // first))
    return True


def _merge(a: Factor, b: Factor) -> None:
    """Make two factors of equal size the same."""
    if a is b:
        return
    if b.kind == "leaf":
        a, b = b, a
    reason = a.reason or b.reason
    is_picked = (a.is_picked or not a.reason) and (b.is_picked or not b.reason) and bool(reason)
    ours, same_kind = a.parts, a.kind == b.kind
    is_leaf = a.kind == "leaf"
    a.same = b
    if reason:
        block((b,), reason, is_picked=is_picked)
        block(ours, reason, is_picked=is_picked)
        b.is_picked = is_picked
    if is_leaf:
        return
    if same_kind and b.kind == "product":
        unify(ours, b.parts)
    elif same_kind:
        _unify_blocks(ours, b)
    else:
        block((*ours, b), MISALIGNED)


def _unify_blocks(ours: Axis, other: Factor) -> None:
    mine = Factor(other.size, kind="sum", parts=ours)
    if _cut(mine, _bounds(other)) and _cut(other, _bounds(mine)):
        for a, b in zip(list(segments(mine)), list(segments(other)), strict=True):
            unify((a,), (b,))
    else:
        block((mine, other), MISALIGNED)


def _bounds(factor: Factor) -> set[int]:
    return set(accumulate(f.size for f in segments(factor)))


def _cut(factor: Factor, bounds: set[int]) -> bool:
    """Make a factor a sum with blocks that end at ``bounds``; tell whether this is possible."""
    factor = representative(factor)
    inside = sorted(b for b in bounds if 0 < b < factor.size)
    if not inside:
        return True
    if factor.kind == "leaf":
        edges = [0, *inside, factor.size]
        sizes = [stop - start for start, stop in pairwise(edges)]
        factor.kind = "sum"
        factor.parts = tuple(Factor(size, factor.reason, factor.is_picked) for size in sizes)
        return True
    if factor.kind == "product":
        return False
    at = 0
    for inner in list(segments(factor)):
        if not _cut(inner, {b - at for b in inside}):
            return False
        at += inner.size
    return True
