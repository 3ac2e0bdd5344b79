"""Evaluate init programs for any part of any tensor.

The guarantee: the value of an element is a function of (seed, canonical path, flat index in the whole tensor, program)
alone. Mesh, layout, order, number of threads and all further tensors have no influence.

- Random *bits* (``philox_cpu.py``) are the same on every device and machine, for a version of the random scheme; the plan
  names the version, and is refused if it differs from this one.
- *Values* are bit-identical over layouts and runs on one kind of machine with one build of torch. Between devices, kinds
  of CPU, or versions of torch they may differ in the last digits, as torch's erfinv, log and tan do, from the same bits.
- float32, bfloat16, float16 and smaller are computed in float32 and rounded once at the end, float64 in float64.

A part is computed in chunks that stay in the cache, in reused memory, then copied to its place; small tensors with the
same program share a chunk. Chunks are padded to whole SIMD registers, since torch rounds the elements past the last whole
register differently (``pow``, ``sigmoid``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import define, frozen
from torch import Tensor

from ...specs.index import row_major
from ...specs.program import Box, Draw, Fill, InitProgram, Map, Set, What
from .constants import compute, decode, operator
from .distributions import sample
from .flat_runs import elements, first_and_last, runs_of, stretches
from .philox_cpu import derive_key
from .random_bits import draw_bits
from .strided_views import box_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...specs.index import Index

CHUNK_ELEMENTS: Mapping[str, int] = {"cpu": 32640, "cuda": 2**20}
"""Elements computed at a time: on the CPU few enough for its cache, and for torch not to split them among threads."""

_MAX_THREADS = 64  # each takes half a MiB
_MAX_THREADS_WITH_INDICES = 4  # each takes 8 MiB, if runs have a single element
_PAD = 64  # elements of the smallest dtype in the widest register


@frozen
class Job:
    """A part of a tensor to be filled with values.

    Args:
        out: Memory of the part: contiguous, in its shape.
        program: The init program of the tensor.
        path: Canonical path of the tensor.
        shape: Shape of the whole tensor.
        index: The part.
    """

    out: Tensor
    program: InitProgram
    path: str
    shape: tuple[int, ...]
    index: Index


def evaluate(jobs: Iterable[Job], seed: int) -> None:
    """Fill parts of tensors with the values of their init programs.

    Beyond the parts it needs a chunk a thread, two for an operation on a box or a truncated normal, and the constants of a
    program at a time.

    Args:
        jobs: The parts.
        seed: The plan's seed.

    >>> import torch
    >>> from shardplan.specs import InitProgram, Operation
    >>> from shardplan.specs.program import Normal
    >>> program = InitProgram([Operation(Normal(0, 1))])
    >>> whole, row = torch.empty(4, 6), torch.empty(1, 6)
    >>> evaluate([Job(whole, program, "up.weight", (4, 6), (((0, 4),), ((0, 6),)))], seed=0)
    >>> evaluate([Job(row, program, "up.weight", (4, 6), (((2, 3),), ((0, 6),)))], seed=0)
    >>> torch.equal(row[0], whole[2])
    True
    """
    alike: dict[object, list[Job]] = {}
    for job in jobs:
        shape = job.shape if any(o.box or isinstance(o.what, (Map, Set)) for o in job.program.operations) else None
        alike.setdefault((job.program, job.out.dtype, job.out.device, shape), []).append(job)
    for group in alike.values():
        _evaluate_alike(group, seed)


def _evaluate_alike(jobs: Sequence[Job], seed: int) -> None:
    """Evaluate parts with the same program, in as many threads as torch may use."""
    out, shape = jobs[0].out, jobs[0].shape
    size = CHUNK_ELEMENTS.get(out.device.type, CHUNK_ELEMENTS["cuda"])
    operations = _prepare(jobs[0].program, shape, out.device)
    total = sum(job.out.numel() for job in jobs)
    chunks, lock = _chunks(jobs, seed, size), Lock()

    def work() -> None:
        memory = torch.zeros(-(-min(size, total) // _PAD) * _PAD, dtype=_computed_in(out.dtype), device=out.device)
        while True:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            _evaluate_chunk(chunk, operations, memory[: -(-chunk.num_elements // _PAD) * _PAD])

    needs_indices = any(o.box or o.constants for o in operations)
    most = _MAX_THREADS_WITH_INDICES if needs_indices else _MAX_THREADS
    num_threads = min(torch.get_num_threads(), most, -(-total // size)) if out.device.type == "cpu" else 1
    if num_threads <= 1:
        work()
        return
    with ThreadPoolExecutor(num_threads) as threads:
        for done in [threads.submit(work) for _ in range(num_threads)]:
            done.result()


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype


@define
class _Chunk:
    """Elements that are computed together.

    Args:
        table: The elements: a row for each stretch of runs.
        targets: Their memory, in the order of the table.
        num_elements: Number of elements.
    """

    table: NDArray[np.int64]
    targets: list[Tensor]
    num_elements: int


def _chunks(jobs: Iterable[Job], seed: int, size: int) -> Iterator[_Chunk]:
    rows: list[tuple[int, ...]] = []
    targets: list[Tensor] = []
    filled = 0
    for job in jobs:
        key, flat, written = derive_key(seed, job.path), job.out.view(-1), 0
        for runs in runs_of(job.shape, job.index):
            for stretch in stretches(runs, size - filled, size):
                num = stretch.num_elements
                rows.append(stretch.row(key, filled))
                targets.append(flat[written : written + num] if num < len(flat) else flat)
                filled += num
                written += num
                if filled == size:
                    yield _Chunk(np.array(rows), targets, filled)
                    rows, targets, filled = [], [], 0
    if filled:
        yield _Chunk(np.array(rows), targets, filled)


def _evaluate_chunk(chunk: _Chunk, operations: Sequence[_Prepared], x: Tensor) -> None:
    num_draws = 0
    for operation in operations:
        operation.apply(x, chunk, num_draws)
        num_draws += isinstance(operation.what, Draw)
    if len(chunk.targets) == 1:
        chunk.targets[0].copy_(x[: chunk.num_elements])
    else:
        parts = x[: chunk.num_elements].split([len(target) for target in chunk.targets])
        torch._foreach_copy_(chunk.targets, parts)  # pyright: ignore[reportPrivateImportUsage]  one call for all


@frozen
class _Prepared:
    """An operation of a program, with its constants computed.

    Args:
        what: The operation.
        box: The elements that it changes.
        shape: Shape of the whole tensor.
        constants: The constants, flat, each of a single element or of as many as the box.
    """

    what: What
    box: Box | None
    shape: tuple[int, ...]
    constants: tuple[Tensor, ...]

    def apply(self, x: Tensor, chunk: _Chunk, draw: int) -> None:
        """Change the elements of a chunk; ``draw`` is the number of random operations before it."""
        if self.box is None:
            self._apply(x, chunk, draw)
            return
        first, last = first_and_last(chunk.table)
        low, high = self._range(self.box)
        if np.any((first <= high) & (last >= low)):
            inside = self._inside(chunk, x)
            changed = x.clone()
            self._apply(changed, chunk, draw)
            torch.where(inside, changed, x, out=x)

    def _apply(self, x: Tensor, chunk: _Chunk, draw: int) -> None:
        match self.what:
            case Fill() as fill:
                x.fill_(fill.number)
            case Set():
                x.copy_(self._gather(0, chunk, x))
            case Map(op=op, args=args, kwargs=kwargs):
                constants = [self._gather(at, chunk, x) for at in range(len(self.constants))]
                given = {name: decode(value, constants) for name, value in kwargs.items()}
                operator(op)(x, *(decode(value, constants) for value in args), **given)
            case _:
                sample(x, self.what, lambda *, unit: draw_bits(x[: chunk.num_elements], chunk.table, draw, unit=unit))

    def _gather(self, at: int, chunk: _Chunk, x: Tensor) -> Tensor:
        constant = self.constants[at]
        if constant.numel() == 1:
            return constant[0]
        place = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for index, (start, stop, step), weight in self._axes(chunk, x):
            place += ((index - start) // step).clamp_(0, len(range(start, stop, step)) - 1) * weight
        return constant[place]

    def _inside(self, chunk: _Chunk, x: Tensor) -> Tensor:
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for index, (start, stop, step), _ in self._axes(chunk, x):
            inside &= (index >= start) & (index < stop) & ((index - start) % step == 0)
        return inside

    def _axes(self, chunk: _Chunk, x: Tensor) -> Iterator[tuple[Tensor, tuple[int, int, int], int]]:
        """Iterate over the axes: the index of each element, the interval of the box, and the stride within the box."""
        flat = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        flat[: chunk.num_elements] = torch.from_numpy(elements(chunk.table)).to(x.device)
        box = self.box or (None,) * len(self.shape)
        weights = row_major(box_shape(self.shape, self.box))
        for size, stride, interval, weight in zip(self.shape, row_major(self.shape), box, weights, strict=True):
            yield flat // stride % size, interval or (0, size, 1), weight

    def _range(self, box: Box) -> tuple[int, int]:
        """Return the smallest and the largest flat index in a box."""
        intervals = [i or (0, size, 1) for i, size in zip(box, self.shape, strict=True)]
        strides = row_major(self.shape)
        low = sum(start * stride for (start, _, _), stride in zip(intervals, strides, strict=True))
        return low, sum((stop - 1) * stride for (_, stop, _), stride in zip(intervals, strides, strict=True))


def _prepare(program: InitProgram, shape: tuple[int, ...], device: torch.device) -> list[_Prepared]:
    prepared: list[_Prepared] = []
    for operation in program.operations:
        match operation.what:
            case Set(constant=constant):
                constants = (constant,)
            case Map(constants=constants):
                pass
            case _:
                constants = ()
        computed = tuple(compute(constant).reshape(-1).to(device) for constant in constants)
        prepared.append(_Prepared(operation.what, operation.box, shape, computed))
    return prepared
