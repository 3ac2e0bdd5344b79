"""Parts of tensors read from files: each rank its own bytes, once, in the order of the files.

Bytes go by way of a MiB that stays in the core's cache, whether they are converted, turned, summed or sent to a device; that
takes no longer than reading to where they stay, as it is there that memory is touched for the first time.

Stretches of the file are read by ``preadv``, neighbouring ones in one call. Short ones with short gaps, the rows of a tensor
that is split along its last axis, are copied out of a mapping of the file instead, which is populated before, so that what
cannot be read is an error, and let go after: a call for each row takes twice as long.
"""

from __future__ import annotations

import errno
import mmap
import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from attrs import Factory, define, field, frozen
from torch import Tensor

from ...specs.errors import PlanError, Problem
from ...specs.index import Index
from .byte_ranges import Taken, staging_bytes, take_all
from .checksum import MODULUS, sum_taken
from .formats.safetensors import header_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from ...specs.stored import Folder, Part, StoredFile, StoredTensor

_SHORT = 2**14  # of longer runs a call costs a tenth at most
_NEAR = 2**16  # pages that a fault maps at once
_SPAN = 2**25  # of a file that is mapped at one time
_MAX_BUFFERS = 1024  # of one call
_MAX_OPEN = 64  # a universal checkpoint has a file a tensor, and a process may open a thousand or so
_POPULATE = 22  # MADV_POPULATE_READ


def read_part(out: Tensor, parts: Iterable[Part], index: Index, files: Files) -> None:
    """Read the entries ``index`` of a tensor.

    Args:
        out: Where they go, in the shape of ``index``; what has another dtype is converted.
        parts: What the tensor is made of.
        index: The entries.
        files: The files.

    Raises:
        PlanError: If a file is not what was planned, or cannot be read.
    """
    read_all([Reading(out, taken) for taken in take_all(parts, index)], files)


@frozen(eq=False)
class Reading:
    """What is read of one stored tensor.

    Args:
        out: The part of a tensor that it belongs to.
        taken: What it is.
        counted: The intervals of each axis of the stored tensor whose elements are summed; None for nothing.
    """

    out: Tensor
    taken: Taken
    counted: Index | None = None


def read_all(readings: Sequence[Reading], files: Files) -> list[int]:
    """Read parts of tensors in the order of the files; return for each the sum of those of its elements that count.

    Raises:
        PlanError: If a file is not what was planned, or cannot be read.
    """
    staging = files.staging(staging_bytes(sum(reading.taken.num_bytes for reading in readings)))
    raw, sums = staging.numpy(), [0] * len(readings)
    for batch in _batches(readings, staging.nbytes):
        _fill(raw, batch, files)
        for number, window, start in batch:
            stop, counted = start + window.num_bytes, readings[number].counted
            if counted is not None:
                sums[number] = (sums[number] + sum_taken(raw[start:stop], window, counted)) % MODULUS
            _place(readings[number].out, window, staging[start:stop])
    return sums


@define
class Files:
    """The files of a folder, each opened when it is read first: ``with Files(folder) as files``.

    Args:
        folder: What they are.
        num_read: Bytes read of each.
    """

    folder: Folder
    num_read: dict[str, int] = Factory(dict)
    _descriptors: dict[str, int] = field(factory=dict, init=False)
    _maps: dict[str, mmap.mmap] = field(factory=dict, init=False)
    _staging: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.uint8), init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._maps.clear()  # unmapped when nothing refers to them: the trace of an error may
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def staging(self, num_bytes: int) -> Tensor:
        """Return memory that is used again by what is read next."""
        if len(self._staging) < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]

    def read(self, buffers: Sequence[memoryview], offset: int, stored: Sequence[StoredTensor]) -> None:
        """Read neighbouring stretches of a file.

        Args:
            buffers: Where they go.
            offset: The first byte in the file.
            stored: Which tensor each of them is of.
        """
        file, left, at = stored[0].file, list(buffers), 0
        descriptor = self._open(stored[0])
        while left:
            try:
                count = os.preadv(descriptor, left, offset)
            except OSError as error:
                raise PlanError([_unread(stored[at], str(error.strerror))]) from None
            if not count:
                raise PlanError([_unread(stored[at], f"it is cut off at byte {offset}")])
            self._note(file, count)
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
                at += 1
            if left:
                left[0] = left[0][count:]

    def gather(self, out: NDArray[np.uint8], taken: Taken) -> None:
        """Copy many short stretches of a file.

        Args:
            out: Where they go, as bytes.
            taken: What they are.
        """
        stored, start, stop = taken.stored, taken.begin // mmap.PAGESIZE * mmap.PAGESIZE, taken.end
        descriptor = self._open(stored)
        mapped = self._maps.get(stored.file)
        if mapped is None:
            mapped = self._maps[stored.file] = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        if os.fstat(descriptor).st_size < stop:
            raise PlanError([_unread(stored, "it is cut off")])
        try:
            mapped.madvise(_POPULATE, start, stop - start)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14 has it not
                raise PlanError([_unread(stored, str(error.strerror))]) from None
        words, size = divmod(stored.item_bytes, 8)
        item = (max(1, words), size or 8)
        whole = np.ndarray((*stored.shape, item[0]), f"u{item[1]}", buffer=mapped, offset=stored.offset)
        into = out.view(whole.dtype).reshape(*taken.shape, item[0])
        for box in _boxes(taken.entries):
            into[tuple(slice(place, place + stop - start) for place, start, stop in box)] = whole[
                tuple(slice(start, stop) for _, start, stop in box)
            ]
        self._note(stored.file, taken.num_bytes)
        mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _open(self, stored: StoredTensor) -> int:
        """Return the descriptor of a tensor's file, once it is known to be the one of the plan."""
        name = stored.file
        if name not in self._descriptors:
            if len(self._descriptors) == _MAX_OPEN:  # files are read one after another: the first is done with
                first = next(iter(self._descriptors))
                self._maps.pop(first, None)
                os.close(self._descriptors.pop(first))
            planned = next(file for file in self.folder.files if file.name == name)
            try:
                self._descriptors[name] = os.open(Path(self.folder.path) / name, os.O_RDONLY | os.O_CLOEXEC)
                wrong = _changed(self._descriptors[name], planned)
            except OSError as error:
                raise PlanError([_unread(stored, str(error.strerror))]) from None
            if wrong:
                raise PlanError([_unread(stored, wrong, "It changed after the plan was made: plan again, or bring it back")])
        return self._descriptors[name]

    def _note(self, file: str, num_bytes: int) -> None:
        self.num_read[file] = self.num_read.get(file, 0) + num_bytes


_Window = tuple[int, Taken, int]
"""What is read in one go: the number of the reading that it is of, what it is, and the byte of the staging it is put at."""


def _batches(readings: Sequence[Reading], room: int) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    filled = 0
    order = sorted((reading.taken.stored.file, reading.taken.begin, number) for number, reading in enumerate(readings))
    for _, _, number in order:
        taken = readings[number].taken
        for window in taken.windows(_most(taken, room)):
            start = -(-filled // window.stored.item_bytes) * window.stored.item_bytes
            if start + window.num_bytes > room:
                yield batch
                batch, start = [], 0
            batch.append((number, window, start))
            filled = start + window.num_bytes
    if batch:
        yield batch


def _is_scattered(taken: Taken) -> bool:
    num_runs, span = taken.num_runs, taken.end - taken.begin
    return num_runs > 1 and taken.num_bytes < _SHORT * num_runs and span < _NEAR * num_runs


def _most(taken: Taken, room: int) -> int:
    """Return the most bytes of a window."""
    return min(room, taken.num_bytes * _SPAN // (taken.end - taken.begin)) if _is_scattered(taken) else room


def _fill(raw: NDArray[np.uint8], batch: Iterable[_Window], files: Files) -> None:
    """Read windows; what meets in a file in one call."""
    buffers: list[memoryview] = []
    stored: list[StoredTensor] = []
    first = end = 0
    memory = memoryview(raw.data)
    for _, window, start in batch:
        if _is_scattered(window):
            files.gather(raw[start : start + window.num_bytes], window)
            continue
        at = start
        for begin, size in window.runs():
            meets = stored and stored[-1].file == window.stored.file and begin == end and len(buffers) < _MAX_BUFFERS
            if buffers and not meets:
                files.read(buffers, first, stored)
                buffers, stored = [], []
            if not buffers:
                first = begin
            buffers.append(memory[at : at + size])
            stored.append(window.stored)
            at, end = at + size, begin + size
    if buffers:
        files.read(buffers, first, stored)


def _place(out: Tensor, window: Taken, staged: Tensor) -> None:
    """Copy what was read to where it belongs; the axes of the part are put in the order of the file for that."""
    shape, view = window.shape, out
    for axis, (place, of) in enumerate(zip(window.at, window.axes, strict=True)):
        view = view.narrow(axis, place, shape[of] if of >= 0 else 1)
    order = sorted(range(len(window.axes)), key=lambda axis: window.axes[axis])
    named = [max(window.axes[axis], -1) for axis in order]
    values = staged.view(getattr(torch, window.stored.dtype)).view([shape[of] if of >= 0 else 1 for of in named])
    view.permute(order).copy_(values)


def _boxes(entries: Index) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Iterate over the boxes of some entries: for each axis the place among what is taken, and the interval."""
    if not entries:
        yield ()
        return
    place = 0
    for start, stop in entries[0]:
        for rest in _boxes(entries[1:]):
            yield (place, start, stop), *rest
        place += stop - start


def _changed(descriptor: int, planned: StoredFile) -> str:
    """Return how an open file differs from the one of the plan; nothing if it does not."""
    size = os.fstat(descriptor).st_size
    if size != planned.num_bytes:
        return f"it has {size} bytes, and {planned.num_bytes} were planned"
    if not planned.digest:
        return ""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        try:
            digest = sha256(header_bytes(file, size)).hexdigest()
        except ValueError as error:
            return str(error)
    return "" if digest == planned.digest else "its header is not the one that was planned"


def _unread(stored: StoredTensor, cause: str, fix: str = "Copy or download the file again") -> Problem:
    return Problem(stored.key, f"{stored.file} cannot be read: {cause}", fix)
