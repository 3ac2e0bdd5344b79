"""Random bits as a function of (key, element, operation): Philox 4x32-10, compiled for the CPU.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the vectors of its reference
implementation, Random123, are in the tests.

Element i of a tensor takes word ``i & 3`` of block ``b = i >> 2``, whose counter is ``(lo b, hi b, operation, 0)``. In
float64 it takes two words of block ``i >> 1``. The words become numbers strictly inside an interval, all exactly
representable, so that no word gives an infinity through the inverse of a distribution:

- ``symmetric``: ``((w >> 8) + ½) · 2⁻²³`` with w as int32, in (−1, 1);
- ``unit``: ``((w >> 9) + ½) · 2⁻²³ + ½``, in (0, 1), so that 1 − v is exact too.

In float64 the same with 64 bits, shifts of 11 and 12, and 2⁻⁵².
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from .flat_runs import FIRST, KEY0, KEY1, LENGTH, N1, N2, NUM_RUNS, OUT, S1, S2, S3, START
from .numba_cache import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85


def derive_key(seed: int, path: str) -> tuple[int, int]:
    """Return the two words of the key of a tensor: BLAKE2b of the plan's seed and the tensor's canonical path.

    >>> derive_key(0, "lm_head.weight") == derive_key(0, "lm_head.weight") != derive_key(1, "lm_head.weight")
    True
    """
    digest = blake2b(f"{seed}:{path}".encode(), digest_size=8, person=b"philox").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def draw(out: NDArray[Any], table: NDArray[np.int64], operation: int, *, unit: bool) -> None:
    """Write the random numbers of the elements in a table.

    Args:
        out: float32 or float64, contiguous.
        table: A row for each stretch of elements (``functional/init/flat_runs.py``).
        operation: Number of the draw in the program.
        unit: Numbers in (0, 1) rather than (−1, 1).
    """
    kernel = _draw64 if out.dtype == np.float64 else _draw32
    kernel(out, table, np.uint32(operation), unit)


_inlined: Any = numba.njit(inline="always")
_M0, _M1 = map(np.uint64, MULTIPLIERS)
_W0, _W1 = map(np.uint32, WEYL)
_32 = np.uint64(32)


@_inlined
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Return the four words of a block; all are uint32."""
    # ten rounds, written out: the compiler vectorises the loop around them only if it holds no inner loop
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    return c0, c1, c2, c3


@_inlined
def _round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    p0 = _M0 * np.uint64(c0)
    p1 = _M1 * np.uint64(c2)
    d0, d2 = np.uint32(p1 >> _32) ^ c1 ^ k0, np.uint32(p0 >> _32) ^ c3 ^ k1
    return d0, np.uint32(p1), d2, np.uint32(p0), np.uint32(k0 + _W0), np.uint32(k1 + _W1)


@_inlined
def _float32(word: Any, shift: Any, lift: Any) -> Any:
    return (np.float32(np.int32(word) >> shift) + np.float32(0.5)) * np.float32(2.0**-23) + lift


@_inlined
def _float64(low: Any, high: Any, shift: Any, lift: Any) -> Any:
    word = np.int64(np.uint64(high) << _32 | np.uint64(low))
    return (np.float64(word >> shift) + 0.5) * 2.0**-52 + lift


@_inlined
def _run_start(row: Any, run: Any) -> Any:
    inner, outer = run % row[N1], run // row[N1]
    return row[START] + inner * row[S1] + (outer % row[N2]) * row[S2] + (outer // row[N2]) * row[S3]


@compiled
def _blocks32(out: Any, num: Any, low: Any, high: Any, operation: Any, k0: Any, k1: Any, shift: Any, lift: Any) -> None:
    """Draw consecutive whole blocks whose counters do not pass 2³²; the compiler vectorises this loop."""
    for j in range(num):
        w0, w1, w2, w3 = philox(np.uint32(low + np.uint32(j)), high, operation, np.uint32(0), k0, k1)
        out[4 * j] = _float32(w0, shift, lift)
        out[4 * j + 1] = _float32(w1, shift, lift)
        out[4 * j + 2] = _float32(w2, shift, lift)
        out[4 * j + 3] = _float32(w3, shift, lift)


@compiled
def _blocks64(out: Any, num: Any, low: Any, high: Any, operation: Any, k0: Any, k1: Any, shift: Any, lift: Any) -> None:
    for j in range(num):
        w0, w1, w2, w3 = philox(np.uint32(low + np.uint32(j)), high, operation, np.uint32(0), k0, k1)
        out[2 * j] = _float64(w0, w1, shift, lift)
        out[2 * j + 1] = _float64(w2, w3, shift, lift)


@_inlined
def _one32(element: Any, operation: Any, k0: Any, k1: Any, shift: Any, lift: Any) -> Any:
    block = np.uint64(element >> 2)
    w0, w1, w2, w3 = philox(np.uint32(block), np.uint32(block >> _32), operation, np.uint32(0), k0, k1)
    lane = element & 3
    return _float32(w0 if lane == 0 else w1 if lane == 1 else w2 if lane == 2 else w3, shift, lift)  # noqa: PLR2004


@_inlined
def _one64(element: Any, operation: Any, k0: Any, k1: Any, shift: Any, lift: Any) -> Any:
    block = np.uint64(element >> 1)
    w0, w1, w2, w3 = philox(np.uint32(block), np.uint32(block >> _32), operation, np.uint32(0), k0, k1)
    return _float64(w2, w3, shift, lift) if element & 1 else _float64(w0, w1, shift, lift)


@compiled
def _draw32(out: Any, table: Any, operation: Any, unit: Any) -> None:
    shift, lift = (np.int32(9), np.float32(0.5)) if unit else (np.int32(8), np.float32(0))
    for s in range(table.shape[0]):
        row = table[s]
        k0, k1, at = np.uint32(row[KEY0]), np.uint32(row[KEY1]), row[OUT]
        for r in range(row[NUM_RUNS]):
            element = _run_start(row, row[FIRST] + r)
            end = element + row[LENGTH]
            while element < end and (element & 3 or end - element < 4):  # noqa: PLR2004
                out[at] = _one32(element, operation, k0, k1, shift, lift)
                element += 1
                at += 1
            while element < end - 3:
                block = np.uint64(element >> 2)
                num = min((end - element) >> 2, (1 << 32) - np.int64(np.uint32(block)))
                _blocks32(
                    out[at : at + 4 * num], num, np.uint32(block), np.uint32(block >> _32), operation, k0, k1, shift, lift
                )
                element += 4 * num
                at += 4 * num
            while element < end:
                out[at] = _one32(element, operation, k0, k1, shift, lift)
                element += 1
                at += 1


@compiled
def _draw64(out: Any, table: Any, operation: Any, unit: Any) -> None:
    shift, lift = (np.int64(12), 0.5) if unit else (np.int64(11), 0.0)
    for s in range(table.shape[0]):
        row = table[s]
        k0, k1, at = np.uint32(row[KEY0]), np.uint32(row[KEY1]), row[OUT]
        for r in range(row[NUM_RUNS]):
            element = _run_start(row, row[FIRST] + r)
            end = element + row[LENGTH]
            if element & 1 and element < end:
                out[at] = _one64(element, operation, k0, k1, shift, lift)
                element += 1
                at += 1
            while element < end - 1:
                block = np.uint64(element >> 1)
                num = min((end - element) >> 1, (1 << 32) - np.int64(np.uint32(block)))
                _blocks64(
                    out[at : at + 2 * num], num, np.uint32(block), np.uint32(block >> _32), operation, k0, k1, shift, lift
                )
                element += 2 * num
                at += 2 * num
            if element < end:
                out[at] = _one64(element, operation, k0, k1, shift, lift)
                at += 1
