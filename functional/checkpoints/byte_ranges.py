"""Which bytes of which files a part of a tensor lies in. No torch, no numpy.

What is taken of a stored tensor is a few intervals of each of its axes, so that a million rows are one record. Its elements
are met in the order of the file; in the tensor they fill one box, whose axes may stand in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from ...specs.index import Index, index_shape, row_major
from ...specs.shard import Interval
from ...specs.source import Loaded
from ...specs.stored import Part, StoredTensor

if TYPE_CHECKING:
    from ...specs.param import ParamSpec

STAGING_BYTES = 2**20
"""Most bytes that lie between the files and the tensors: what stays in a core's cache."""


@frozen
class Taken:
    """What is taken of a stored tensor, and the box that it fills in a part of a tensor.

    Args:
        stored: The stored tensor.
        entries: The intervals of each of its axes that are taken, in order.
        at: Where the box begins in the part, for each axis of that.
        axes: For each axis of the part the axis of the stored tensor; -1 for a new axis, of one entry here.

    >>> up = StoredTensor("model.safetensors", "up.weight", 80, (6, 8), "float32")
    >>> taken = take(Part.whole(up), (((2, 5),), ((0, 4),)))
    >>> taken.num_bytes, list(taken.runs())
    (48, [(144, 16), (176, 16), (208, 16)])
    >>> [window.shape for window in taken.windows(32)]
    [(2, 4), (1, 4)]
    """

    stored: StoredTensor
    entries: Index
    at: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many entries of each axis of the stored tensor are taken."""
        return index_shape(self.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""
        return prod(self.shape) * self.stored.item_bytes

    @property
    def begin(self) -> int:
        """First byte in the file."""
        return self.stored.offset + self._flat([intervals[0][0] for intervals in self.entries]) * self.stored.item_bytes

    @property
    def end(self) -> int:
        """The byte in the file after the last."""
        last = self._flat([intervals[-1][1] - 1 for intervals in self.entries])
        return self.stored.offset + (last + 1) * self.stored.item_bytes

    @property
    def num_runs(self) -> int:
        """Stretches of the file that it is read from, those counted one by one that happen to meet."""
        cut = self._num_cut()
        return prod(self.shape[: cut - 1]) * len(self.entries[cut - 1]) if cut else 1

    def runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over the stretches of the file: the first byte, and how many. Those that meet are one."""
        first, length = self.begin, 0
        for start, size in self._rows():
            if start == first + length:
                length += size
            else:
                yield first, length
                first, length = start, size
        yield first, length

    def windows(self, max_bytes: int) -> Iterator[Taken]:
        """Iterate over pieces of it of at most so many bytes, or one element, in the order of the file."""
        axis = next((axis for axis, size in enumerate(self.shape) if size > 1), None)
        if axis is None or self.num_bytes <= max_bytes:
            yield self
            return
        size = self.shape[axis]
        step = max(1, max_bytes * size // self.num_bytes)
        for start in range(0, size, step):
            yield from self._narrow(axis, start, min(start + step, size)).windows(max_bytes)

    def _rows(self) -> Iterator[tuple[int, int]]:
        item, cut = self.stored.item_bytes, self._num_cut()
        if not cut:
            yield self.stored.offset, self.num_bytes
            return
        units = [unit * item for unit in row_major(self.stored.shape)]
        outer = [
            [place * unit for start, stop in intervals for place in range(start, stop)]
            for intervals, unit in zip(self.entries[: cut - 1], units, strict=False)
        ]
        unit = units[cut - 1]
        inner = [(self.stored.offset + start * unit, (stop - start) * unit) for start, stop in self.entries[cut - 1]]
        for places in product(*outer):
            row = sum(places)
            for start, size in inner:
                yield row + start, size

    def _num_cut(self) -> int:
        """Return the number of axes up to the last one that is not taken whole."""
        cut = [axis for axis, size in enumerate(self.stored.shape) if self.entries[axis] != ((0, size),)]
        return cut[-1] + 1 if cut else 0

    def _narrow(self, axis: int, start: int, stop: int) -> Taken:
        """Return the entries from ``start`` to ``stop`` of those that are taken of an axis."""
        entries = (*self.entries[:axis], _between(self.entries[axis], start, stop), *self.entries[axis + 1 :])
        at = tuple(place + start if of == axis else place for place, of in zip(self.at, self.axes, strict=True))
        return evolve(self, entries=entries, at=at)

    def _flat(self, places: Iterable[int]) -> int:
        return sum(place * unit for place, unit in zip(places, row_major(self.stored.shape), strict=True))


def stored_parts(spec: ParamSpec) -> tuple[Part, ...]:
    """Return what a tensor is made of that lies in files."""
    assert isinstance(spec.source, Loaded), f"{spec.path} lies in no file"
    return spec.source.parts


def take(part: Part, index: Index) -> Taken | None:
    """Return what a part of a checkpoint gives to the entries ``index`` of a tensor; None for nothing."""
    found = part.within(index)
    if found is None:
        return None
    entries: list[tuple[Interval, ...]] = [(interval,) for interval in part.box]
    at: list[int] = []
    for intervals, wanted, of, start in zip(found, index, part.axes, part.at, strict=True):
        first = intervals[0][0]
        at.append(sum(min(stop, first) - begin for begin, stop in wanted if begin < first))
        if of >= 0:
            shift = part.box[of][0] - start
            entries[of] = tuple((begin + shift, stop + shift) for begin, stop in intervals)
    return Taken(part.stored, tuple(entries), tuple(at), part.axes)


def take_all(parts: Iterable[Part], index: Index) -> list[Taken]:
    """Return what fills the entries ``index`` of a tensor, in the order in which it lies in the files."""
    found = (take(part, index) for part in parts)
    return sorted((taken for taken in found if taken), key=lambda taken: (taken.stored.file, taken.begin))


def staging_bytes(num_bytes: int) -> int:
    """Return the bytes that reading takes besides the tensors, when ``num_bytes`` are read in one go."""
    return min(num_bytes, STAGING_BYTES)


def _between(intervals: tuple[Interval, ...], first: int, last: int) -> tuple[Interval, ...]:
    found: list[Interval] = []
    place = 0
    for start, stop in intervals:
        low, high = max(first, place), min(last, place + stop - start)
        if low < high:
            found.append((start + low - place, start + high - place))
        place += stop - start
    return tuple(found)
