"""Read parts of tensors from files: each rank reads its own bytes, once, in the order of the files.

All bytes pass through a buffer of 1 MiB that stays in the core's cache, where they are converted, permuted, summed or
sent to a device. This is as fast as reading straight into the tensors, whose memory is then touched for the first time.

Byte ranges are read by ``preadv``, adjacent ranges together. Short ranges with short gaps (the rows of a tensor split
along its last axis) are copied from a memory mapping instead: a call for each row takes twice as long. The mapping is
populated beforehand, so that an unreadable page is an error rather than a signal, and dropped afterwards.
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
from .byte_ranges import Selection, staging_bytes
from .checksum import MODULUS, sum_selected
from .formats.safetensors import header_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from ...specs.stored import Folder, StoredFile, StoredTensor

_SHORT = 2**14  # bytes of a range; for longer ranges the call itself costs a tenth at most
_NEAR = 2**16  # bytes that one page fault maps
_SPAN = 2**25  # bytes of a file mapped at one time
_MAX_BUFFERS = 1024  # of one ``preadv``
_MAX_OPEN = 64  # a universal checkpoint has a file a tensor, and a process may open about a thousand
_POPULATE = 22  # MADV_POPULATE_READ


@frozen(eq=False)
class ReadRequest:
    """A selection to read, and the tensor that it goes to.

    Args:
        out: The part of a model's tensor that holds the selection's box; elements are converted to its dtype.
        selection: The selection.
        counted: The intervals of each stored axis whose elements are summed; None for no checksum.
    """

    out: Tensor
    selection: Selection
    counted: Index | None = None


def read_all(requests: Sequence[ReadRequest], files: Files) -> list[int]:
    """Read selections in the order of the files; return the checksum of the counted elements of each request.

    Raises:
        PlanError: If a file has changed since it was planned, or cannot be read.
    """
    staging = files.staging(staging_bytes(sum(request.selection.num_bytes for request in requests)))
    raw, sums = staging.numpy(), [0] * len(requests)
    for batch in _batches(requests, staging.nbytes):
        _fill(raw, batch, files)
        for number, window, start in batch:
            stop, counted = start + window.num_bytes, requests[number].counted
            if counted is not None:
                sums[number] = (sums[number] + sum_selected(raw[start:stop], window, counted)) % MODULUS
            _store(staging[start:stop], window, requests[number].out)
    return sums


@define
class Files:
    """The files of a folder, each opened at its first read: ``with Files(folder) as files``.

    Args:
        folder: The folder and the planned files.
        num_read: Bytes read from each file so far.
    """

    folder: Folder
    num_read: dict[str, int] = Factory(dict)
    _descriptors: dict[str, int] = field(factory=dict, init=False)
    _maps: dict[str, mmap.mmap] = field(factory=dict, init=False)
    _staging: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.uint8), init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._maps.clear()  # unmapped when nothing refers to them: a traceback may
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def staging(self, num_bytes: int) -> Tensor:
        """Return the buffer that all reads share."""
        if len(self._staging) < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]

    def read(self, buffers: Sequence[memoryview], offset: int, stored: Sequence[StoredTensor]) -> None:
        """Read adjacent byte ranges of a file from ``offset`` on into buffers, one for each stored tensor."""
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

    def gather(self, out: NDArray[np.uint8], selection: Selection) -> None:
        """Copy the many short byte ranges of a selection to ``out``."""
        stored, start, stop = selection.stored, selection.begin // mmap.PAGESIZE * mmap.PAGESIZE, selection.end
        descriptor = self._open(stored)
        mapped = self._maps.get(stored.file)
        if mapped is None:
            mapped = self._maps[stored.file] = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        if os.fstat(descriptor).st_size < stop:
            raise PlanError([_unread(stored, "it is cut off")])
        try:
            mapped.madvise(_POPULATE, start, stop - start)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14 does not know it
                raise PlanError([_unread(stored, str(error.strerror))]) from None
        words, size = divmod(stored.item_bytes, 8)
        item = (max(1, words), size or 8)
        whole = np.ndarray((*stored.shape, item[0]), f"u{item[1]}", buffer=mapped, offset=stored.offset)
        into = out.view(whole.dtype).reshape(*selection.shape, item[0])
        for box in _boxes(selection.entries):
            into[tuple(slice(place, place + stop - start) for place, start, stop in box)] = whole[
                tuple(slice(start, stop) for _, start, stop in box)
            ]
        self._note(stored.file, selection.num_bytes)
        mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _open(self, stored: StoredTensor) -> int:
        """Return the descriptor of a tensor's file; when it is opened, check that it is the planned file."""
        name = stored.file
        if name not in self._descriptors:
            if len(self._descriptors) == _MAX_OPEN:  # files are read in order: the oldest is finished
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


_Window = tuple[int, Selection, int]
"""A piece of a request that fits the buffer: the request's number, the selection, and its first byte in the buffer."""


def _batches(requests: Sequence[ReadRequest], room: int) -> Iterator[list[_Window]]:
    """Iterate over lists of windows that fill the buffer once, in the order of the files."""
    batch: list[_Window] = []
    filled = 0
    order = sorted((request.selection.stored.file, request.selection.begin, n) for n, request in enumerate(requests))
    for *_, number in order:
        selection = requests[number].selection
        for window in selection.windows(_max_window_bytes(selection, room)):
            start = -(-filled // window.stored.item_bytes) * window.stored.item_bytes
            if start + window.num_bytes > room:
                yield batch
                batch, start = [], 0
            batch.append((number, window, start))
            filled = start + window.num_bytes
    if batch:
        yield batch


def _is_scattered(selection: Selection) -> bool:
    """Tell whether a selection is many short byte ranges with short gaps."""
    num_runs, span = selection.num_runs, selection.end - selection.begin
    return num_runs > 1 and selection.num_bytes < _SHORT * num_runs and span < _NEAR * num_runs


def _max_window_bytes(selection: Selection, room: int) -> int:
    if not _is_scattered(selection):
        return room
    return min(room, selection.num_bytes * _SPAN // (selection.end - selection.begin))


def _fill(raw: NDArray[np.uint8], batch: Iterable[_Window], files: Files) -> None:
    """Read windows into the buffer, adjacent byte ranges together."""
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


def _store(staged: Tensor, window: Selection, out: Tensor) -> None:
    """Copy a window from the buffer to its box, whose axes are permuted to the order of the file."""
    shape, view = window.shape, out
    for axis, (place, of) in enumerate(zip(window.at, window.axes, strict=True)):
        view = view.narrow(axis, place, shape[of] if of >= 0 else 1)
    order = sorted(range(len(window.axes)), key=lambda axis: window.axes[axis])
    named = [max(window.axes[axis], -1) for axis in order]
    values = staged.view(getattr(torch, window.stored.dtype)).view([shape[of] if of >= 0 else 1 for of in named])
    view.permute(order).copy_(values)


def _boxes(entries: Index) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Iterate over the boxes of a selection: for each axis the place among the selected entries, and the interval."""
    if not entries:
        yield ()
        return
    place = 0
    for start, stop in entries[0]:
        for rest in _boxes(entries[1:]):
            yield (place, start, stop), *rest
        place += stop - start


def _changed(descriptor: int, planned: StoredFile) -> str:
    """Return how an open file differs from the planned file; "" if it does not."""
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
