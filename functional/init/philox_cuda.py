"""Philox 4x32-10 on CUDA, as a Triton kernel for any number of stretches; the same numbers as ``philox_cpu.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .flat_runs import LENGTH, NUM_RUNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TILE = 256  # blocks of four words that a program makes


def draw(x: Tensor, table: NDArray[np.int64], operation: int, *, unit: bool) -> None:
    """Fill a tensor as ``draw_bits`` does, in a single launch.

    Each run is covered by whole blocks; a program makes the blocks of one tile of a stretch, all four words of each, and
    stores the words that lie in the run.
    """
    lanes = 2 if x.dtype == torch.float64 else 4
    blocks = (table[:, LENGTH] + lanes - 2) // lanes + 1  # at most, wherever a run begins
    tiles = -(-blocks * table[:, NUM_RUNS] // _TILE)
    stretch = np.repeat(np.arange(len(table)), tiles)
    first = (np.arange(len(stretch)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * _TILE
    rows = np.column_stack([table[stretch], blocks[stretch], first])
    on_device = torch.from_numpy(rows).to(x.device)
    launch: Any = _draw
    launch[(len(rows),)](x, on_device, operation, UNIT=unit, DOUBLE=lanes == 2, TILE=_TILE, COLUMNS=rows.shape[1])  # noqa: PLR2004


@triton.jit
def _draw(
    out: Any, table: Any, operation: Any, UNIT: tl.constexpr, DOUBLE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    row = table + tl.program_id(0) * COLUMNS
    key = tl.load(row).to(tl.uint64) | (tl.load(row + 1).to(tl.uint64) << 32)
    at, start, length = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    first_run, num_runs, n1, n2 = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    s1, s2, s3 = tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    blocks, first = tl.load(row + 12), tl.load(row + 13)
    nth = first + tl.arange(0, TILE)
    run = nth // blocks
    q = first_run + run
    outer = q // n1
    begin = start + (q % n1) * s1 + (outer % n2) * s2 + (outer // n2) * s3
    lanes = 2 if DOUBLE else 4
    block = begin // lanes + nth % blocks
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(key, low, high, (zero + operation).to(tl.uint32), zero)
    to = out + at + run * length + block * lanes - begin
    left = begin - block * lanes  # lanes of this block that come before the run
    right = tl.where(run < num_runs, begin + length - block * lanes, 0)
    if DOUBLE:
        tl.store(to, _float64(w0, w1, UNIT), mask=(left <= 0) & (right > 0))
        tl.store(to + 1, _float64(w2, w3, UNIT), mask=(left <= 1) & (right > 1))
    else:
        tl.store(to, _float32(w0, UNIT), mask=(left <= 0) & (right > 0))
        tl.store(to + 1, _float32(w1, UNIT), mask=(left <= 1) & (right > 1))
        tl.store(to + 2, _float32(w2, UNIT), mask=(left <= 2) & (right > 2))  # noqa: PLR2004
        tl.store(to + 3, _float32(w3, UNIT), mask=(left <= 3) & (right > 3))  # noqa: PLR2004


@triton.jit
def _float32(word: Any, UNIT: tl.constexpr) -> Any:
    signed = word.to(tl.int32, bitcast=True)
    if UNIT:
        return ((signed >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07 + 0.5
    return ((signed >> 8).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _float64(low: Any, high: Any, UNIT: tl.constexpr) -> Any:
    signed = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)).to(tl.int64, bitcast=True)
    half = tl.full([1], 0.5, tl.float64)
    scale = tl.full([1], 2.220446049250313e-16, tl.float64)
    if UNIT:
        return ((signed >> 12).to(tl.float64) + half) * scale + half
    return ((signed >> 11).to(tl.float64) + half) * scale
