"""An axis of a tensor split over a mesh axis: the entries that each coordinate holds, by integer arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from math import lcm
from typing import TYPE_CHECKING, Any, TypedDict, cast

from attrs import Attribute, evolve, field, frozen
from attrs.validators import deep_iterable, ge, in_

from .intervals import Interval
from .json_values import check_integer
from .mesh import SPLIT_AXES, MeshAxis

if TYPE_CHECKING:
    from .mesh import Coordinate, Mesh

_MAX_TRIES = 4096  # of fewer ranks
_MAX_NAMED = 3


def _sizes(blocks: Any) -> tuple[int, ...]:
    if isinstance(blocks, (str, bytes)) or not isinstance(blocks, Iterable):
        msg = f"blocks are sizes, such as (64, 32, 32), not {blocks!r}"
        raise TypeError(msg)
    return tuple(cast("Iterable[int]", blocks))


def _check_flag(_: Shard, attribute: Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        msg = f"{attribute.name} is True or False, not {value!r}"
        raise TypeError(msg)


class Split(TypedDict, total=False):
    """How an axis is split: arguments of ``Shard`` besides the axes."""

    blocks: tuple[int, ...]
    interleaved: int
    granule: int
    replicate: bool
    uneven: bool
    allow_empty: bool
    pad_to_multiple: int


@frozen
class Held:
    """Consecutive entries of an axis that a coordinate holds.

    Args:
        start: The first.
        stop: The end (exclusive).
        num_holders: How many neighbouring ranks along the mesh axis hold them.
        holder: Number of this coordinate among these ranks.
    """

    start: int
    stop: int
    num_holders: int = 1
    holder: int = 0


@frozen
class Misfit:
    """Why an axis cannot be split over a number of ranks, and the nearest that can be done."""

    cause: str
    fix: str


@frozen
class Shard:
    """An axis of a tensor, split along a mesh axis.

    The axis is one block, or several laid one after another, or groups of such blocks; each block is split on its own. Of a
    block of m granules each of n ranks gets m / n, in order: with several blocks (q|k|v, gate|up) a rank holds some of each.

    Args:
        axis: Axis of the tensor, counted from 0.
        mesh_axis: Mesh axis whose ranks share it: ``data``, ``expert`` or ``tensor``.
        blocks: Sizes of the blocks, of a single group where it is interleaved; empty for a single block.
        interleaved: Equal groups that the axis consists of (a head's q, k and v, in GPT-NeoX). Ranks get whole groups; with
            fewer groups than ranks, the ranks of a group share its blocks.
        granule: Entries that stay together, such as those of an attention head.
        replicate: With fewer granules than ranks, each is held by as many neighbouring ranks.
        uneven: Blocks that do not divide are split as ``torch.chunk`` does: ceil(m / n) granules each until none is left.
        allow_empty: An uneven split may leave ranks without any.
        pad_to_multiple: Zeros after the last entry, up to a multiple of this, where several ranks share the axis; the first
            axis of a tensor alone can be padded.

    Raises:
        ValueError: If a number is below its least, or options contradict each other.

    >>> from shardplan.specs import Mesh
    >>> [Shard(axis=0).intervals(12, Mesh(tensor=4).coordinate(rank)) for rank in (0, 2)]
    [((0, 3),), ((6, 9),)]
    >>> qkv = Shard(axis=0, blocks=(8, 4, 4), granule=2, replicate=True)
    >>> qkv.intervals(16, Mesh(tensor=4).coordinate(3))
    ((6, 8), (10, 12), (14, 16))
    """

    axis: int = field(validator=[check_integer, ge(0)])
    mesh_axis: MeshAxis = field(default="tensor", validator=in_(("pipe", *SPLIT_AXES)))
    blocks: tuple[int, ...] = field(default=(), converter=_sizes, validator=deep_iterable([check_integer, ge(1)]))
    interleaved: int = field(default=1, validator=[check_integer, ge(1)])
    granule: int = field(default=1, validator=[check_integer, ge(1)])
    replicate: bool = field(default=False, validator=_check_flag)
    uneven: bool = field(default=False, validator=_check_flag)
    allow_empty: bool = field(default=False, validator=_check_flag)
    pad_to_multiple: int = field(default=1, validator=[check_integer, ge(1)])

    def __attrs_post_init__(self) -> None:
        shaped = self.blocks or self.interleaved > 1 or self.granule > 1 or self.replicate or self.uneven
        wrong = ""
        if self.pad_to_multiple > 1 and (shaped or self.axis):
            wrong = "pad_to_multiple is for the first axis, as one block of single entries"
        elif self.replicate and self.uneven:
            wrong = "replicate repeats granules, and uneven gives some ranks fewer: an axis has one of them"
        elif self.interleaved > 1 and self.uneven:
            wrong = "interleaved groups are split evenly"
        elif self.allow_empty and not self.uneven:
            wrong = "allow_empty is for uneven splits"
        if wrong:
            raise ValueError(wrong)

    def intervals(self, size: int, coordinate: Coordinate) -> tuple[Interval, ...]:
        """Return the entries of an axis of ``size`` that ``coordinate`` holds, in order; adjacent intervals are merged.

        Raises:
            ValueError: If they cannot be split so; :meth:`misfit` says why.
        """
        merged: list[Interval] = []
        for held in self.held(size, coordinate):
            if merged and merged[-1][1] == held.start:
                merged[-1] = merged[-1][0], held.stop
            else:
                merged.append((held.start, held.stop))
        return tuple(merged)

    def held(self, size: int, coordinate: Coordinate) -> tuple[Held, ...]:
        """Return the entries that ``coordinate`` holds, block by block, with the ranks that hold them too."""
        num, index = coordinate.mesh.num(self.mesh_axis), coordinate.index(self.mesh_axis)
        if num == 1:
            return tuple(_nonempty([Held(0, size)]))
        if misfit := self.misfit(size, num):
            raise ValueError(misfit.cause)
        if self.pad_to_multiple > 1:
            part = self._padded(size) // num
            return tuple(_nonempty([Held(min(index * part, size), min((index + 1) * part, size))]))
        group = size // self.interleaved
        if self.interleaved % num == 0:
            part = size // num
            return tuple(_nonempty([Held(index * part, (index + 1) * part)]))
        at, within = divmod(index, num // self.interleaved)
        starts = accumulate((at * group, *self._blocks(group)))
        blocks = zip(starts, self._blocks(group), strict=False)
        return tuple(_nonempty(self._part(start, block, num // self.interleaved, within) for start, block in blocks))

    def length(self, size: int, coordinate: Coordinate) -> int:
        """Return how many entries ``coordinate`` has, padding counted.

        >>> from shardplan.specs import Mesh
        >>> Shard(axis=0, pad_to_multiple=8).length(50257, Mesh(tensor=8).coordinate(7))
        6283
        """
        num = coordinate.mesh.num(self.mesh_axis)
        if self.pad_to_multiple > 1 and num > 1:
            return self._padded(size) // num
        return sum(stop - start for start, stop in self.intervals(size, coordinate))

    def longest(self, size: int, mesh: Mesh) -> int:
        """Return the entries of the first rank, which has as many as any other: the stride from rank to rank."""
        return self.length(size, mesh.coordinate(0))

    def is_even(self, size: int, mesh: Mesh) -> bool:
        """Tell whether all ranks have equally many entries."""
        return not self.uneven or all(block // self.granule % mesh.num(self.mesh_axis) == 0 for block in self._blocks(size))

    def misfit(self, size: int, num: int) -> Misfit | None:
        """Return why an axis of ``size`` entries cannot be split so over ``num`` ranks, if it cannot."""
        cause, fix = self._why_not(size, num)
        return Misfit(cause, fix or self._nearest(size, num)) if cause else None

    def _why_not(self, size: int, num: int) -> tuple[str, str]:
        """Return why it cannot be split so, and the fix if known; empty strings if it can."""
        if self.pad_to_multiple > 1 and num > 1:
            padded, multiple = self._padded(size), lcm(self.pad_to_multiple, num)
            cause = self._cause(f"{size} entries, padded to {padded}", padded, num) if padded % num else ""
            return cause, f"Pad it to {-(-size // multiple) * multiple}: pad_to_multiple={multiple}"
        if self.blocks and sum(self.blocks) * self.interleaved != size:
            groups = f" in each of {self.interleaved} groups" if self.interleaved > 1 else ""
            blocks = f"blocks {self.blocks}{groups} have {sum(self.blocks) * self.interleaved}"
            return f"axis {self.axis} has {size} entries, and {blocks}", "Give the sizes of all blocks, in order"
        if size % self.interleaved:
            cause = f"axis {self.axis} has {size} entries, which {self.interleaved} groups do not divide"
            return cause, "Give the number of groups"
        if self.interleaved % num == 0:
            return "", ""
        if num % self.interleaved:
            groups = f"{self.interleaved} groups of {size // self.interleaved}"
            return self._cause(groups, self.interleaved, num), ""
        found = (self._why_not_block(block, num) for block in self._blocks(size // self.interleaved))
        return next(filter(any, found), ("", ""))

    def _why_not_block(self, block: int, num: int) -> tuple[str, str]:
        count, rest = divmod(block, self.granule)
        each = "a block of " if self.blocks or self.interleaved > 1 else ""
        if rest:
            cause = f"axis {self.axis} has {each}{block} entries, which granules of {self.granule} do not divide"
            return cause, "Give the entries that stay together, such as those of a head"
        sharing = num // self.interleaved
        if count % sharing == 0 or (count and self.replicate and sharing % count == 0):
            return "", ""
        what = f"{count} entries" if self.granule == 1 else f"{count} granules of {self.granule}"
        cause = self._cause(f"{each}{what}", count, num)
        used = -(-count // -(-count // sharing))
        if self.uneven:
            is_filled = used == num or self.allow_empty
            idle = f"{num - used} rank{'s' if num - used > 1 else ''}"
            return ("", "") if is_filled else (f"{cause}: {idle} would hold nothing", "")
        return cause, ""

    def _nearest(self, size: int, num: int) -> str:
        """Return the nearest splits that can be declared instead."""
        ways: list[tuple[str, Split]] = [
            ("repeat them: replicate=True", {"replicate": True}),
            (f"pad it to {-(-size // num) * num}: pad_to_multiple={num}", {"pad_to_multiple": num}),
            ("allow uneven parts: uneven=True", {"uneven": True}),
            *([("allow empty parts too: allow_empty=True", Split(allow_empty=True))] if self.uneven else []),
        ]
        fixes = [text for text, change in ways if self._would_fit(change, size, num)]
        found = (n for n in range(num - 1, max(1, num - _MAX_TRIES), -1) if not self._why_not(size, n)[0])
        fewer = " or ".join(map(str, sorted(islice(found, _MAX_NAMED))))
        text = "; or ".join([*fixes, f"split it over {fewer} ranks" if fewer else "leave it whole"])
        return text[0].upper() + text[1:]

    def _would_fit(self, change: Split, size: int, num: int) -> bool:
        try:
            return not evolve(self, **change)._why_not(size, num)[0]  # noqa: SLF001  its own class
        except ValueError:  # it contradicts what is said
            return False

    def _cause(self, what: str, count: int, num: int) -> str:
        groups = self.interleaved if num % self.interleaved == 0 and num > self.interleaved > 1 else 1
        each = f", {num // groups} for each of {groups} groups" if groups > 1 else ""
        divisor = f"{num // groups} does not divide {count}"
        return f"axis {self.axis} has {what}, mesh axis {self.mesh_axis!r} has {num}{each}, and {divisor}"

    def _part(self, start: int, block: int, num: int, index: int) -> Held:
        count = block // self.granule
        if count % num == 0:
            part, first, holders, holder = count // num, index * (count // num), 1, 0
        elif self.replicate:
            holders = num // count
            first, holder = divmod(index, holders)
            part = 1
        else:
            part, holders, holder = -(-count // num), 1, 0
            first = min(index * part, count)
            part = min(part, count - first)
        first = start + first * self.granule
        return Held(first, first + part * self.granule, holders, holder)

    def _blocks(self, group: int) -> tuple[int, ...]:
        return self.blocks or (group,)

    def _padded(self, size: int) -> int:
        return -(-size // self.pad_to_multiple) * self.pad_to_multiple

    def axis_type(self, size: int) -> str:
        """Return the printed form of the axis.

        >>> Shard(axis=0, blocks=(64, 32, 32), granule=16, replicate=True).axis_type(128)
        '64|32|32@tensor(repeated)'
        >>> Shard(axis=0, interleaved=8).axis_type(192), Shard(axis=0, pad_to_multiple=8).axis_type(50257)
        ('8x24@tensor', '50257+7@tensor')
        """
        entries = "|".join(map(str, self.blocks)) or str(size // self.interleaved)
        if self.interleaved > 1:
            entries = f"{self.interleaved}x({entries})" if self.blocks else f"{self.interleaved}x{entries}"
        if self.pad_to_multiple > 1 and self._padded(size) > size:
            entries = f"{size}+{self._padded(size) - size}"
        how = "(repeated)" if self.replicate else "(uneven)" if self.uneven else ""
        return f"{entries}@{self.mesh_axis}{how}"


def _nonempty(parts: Iterator[Held] | list[Held]) -> Iterator[Held]:
    return (held for held in parts if held.stop > held.start)
