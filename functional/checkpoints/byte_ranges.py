"""Byte ranges in the files that hold a part of a tensor.

A selection has a few intervals along each axis of a stored tensor, so that a million rows are one record. Its elements are
read in the order of the file; in the model's tensor they fill one box, whose axes may be permuted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from ...specs.index import Index, index_shape, row_major
from ...specs.intervals import Interval, between
from ...specs.source import Loaded
from ...specs.stored import Part, StoredTensor

if TYPE_CHECKING:
    from ...specs.param import ParamSpec

STAGING_BYTES = 2**20
"""Size of the buffer between files and tensors: it fits a core's cache."""


@frozen
class Selection:
    """A selection of a stored tensor's elements, and the box that they fill in a part of a model's tensor.

    Args:
        stored: The stored tensor.
        entries: The selected intervals of each stored axis, in order.
        at: First entry of the box along each axis of the part.
        axes: For each axis of the part the stored axis; -1 for a new axis, of size 1.

    >>> up = StoredTensor("model.safetensors", "up.weight", 80, (6, 8), "float32")
    >>> rows = select(Part.whole(up), (((2, 5),), ((0, 4),)))
    >>> rows.num_bytes, list(rows.runs())
    (48, [(144, 16), (176, 16), (208, 16)])
    >>> [window.shape for window in rows.windows(32)]
    [(2, 4), (1, 4)]
    """

    stored: StoredTensor
    entries: Index
    at: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of selected entries of each stored axis."""
        return index_shape(self.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes selected."""
        return prod(self.shape) * self.stored.item_bytes

    @property
    def begin(self) -> int:
        """Byte of the file at which the selection begins."""
        return self.stored.offset + self._flat([intervals[0][0] for intervals in self.entries]) * self.stored.item_bytes

    @property
    def end(self) -> int:
        """Byte of the file after the selection's last."""
        last = self._flat([intervals[-1][1] - 1 for intervals in self.entries])
        return self.stored.offset + (last + 1) * self.stored.item_bytes

    @property
    def num_runs(self) -> int:
        """Number of contiguous byte ranges, at most: adjacent ranges are counted separately."""
        cut = self._num_cut()
        return prod(self.shape[: cut - 1]) * len(self.entries[cut - 1]) if cut else 1

    def runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over the contiguous byte ranges, adjacent ranges merged: first byte and length."""
        first, length = self.begin, 0
        for start, size in self._rows():
            if start == first + length:
                length += size
            else:
                yield first, length
                first, length = start, size
        yield first, length

    def windows(self, max_bytes: int) -> Iterator[Selection]:
        """Cut the selection into pieces of at most ``max_bytes`` (at least one element), in the order of the file."""
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
        """Return the number of axes up to the last axis that is not selected whole."""
        cut = [axis for axis, size in enumerate(self.stored.shape) if self.entries[axis] != ((0, size),)]
        return cut[-1] + 1 if cut else 0

    def _narrow(self, axis: int, start: int, stop: int) -> Selection:
        """Keep the entries from ``start`` to ``stop``, counted among the selected entries of an axis."""
        entries = (*self.entries[:axis], between(self.entries[axis], start, stop), *self.entries[axis + 1 :])
        at = tuple(place + start if of == axis else place for place, of in zip(self.at, self.axes, strict=True))
        return evolve(self, entries=entries, at=at)

    def _flat(self, places: Iterable[int]) -> int:
        return sum(place * unit for place, unit in zip(places, row_major(self.stored.shape), strict=True))


def stored_parts(spec: ParamSpec) -> tuple[Part, ...]:
    """Return the parts of a tensor that is read from files."""
    assert isinstance(spec.source, Loaded), f"{spec.path} lies in no file"
    return spec.source.parts


def select(part: Part, index: Index) -> Selection | None:
    """Select the elements of a part that lie in the entries ``index`` of the tensor; None if there are none."""
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
    return Selection(part.stored, tuple(entries), tuple(at), part.axes)


def select_all(parts: Iterable[Part], index: Index) -> list[Selection]:
    """Select the elements of all parts that fill the entries ``index`` of a tensor, in the order of the files."""
    found = (selection for part in parts if (selection := select(part, index)))
    return sorted(found, key=lambda selection: (selection.stored.file, selection.begin))


def staging_bytes(num_bytes: int) -> int:
    """Return the size of the buffer through which ``num_bytes`` are read."""
    return min(num_bytes, STAGING_BYTES)
