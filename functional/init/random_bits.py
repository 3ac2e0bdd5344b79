"""Random bits on the device of a tensor, the same on every device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import philox_cpu as philox
from .flat_runs import KEY0, KEY1, LENGTH, NUM_RUNS, elements

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MASK = 0xFFFFFFFF
_HAS_TRITON = find_spec("triton") is not None


def draw_bits(x: Tensor, table: NDArray[np.int64], operation: int, *, unit: bool) -> None:
    """Fill a tensor with the random numbers of its elements, as ``philox_cpu`` defines them.

    On the CPU by numba, on CUDA by Triton, or by torch's integer operations where Triton is missing.

    Args:
        x: float32 or float64, flat, of as many elements as the table has.
        table: A row for each stretch of elements.
        operation: Number of the draw in the program.
        unit: Numbers in (0, 1) rather than (−1, 1).
    """
    if x.device.type == "cpu":
        philox.draw(x.numpy(), table, operation, unit=unit)
    elif x.device.type == "cuda" and _HAS_TRITON:
        from .philox_cuda import draw

        draw(x, table, operation, unit=unit)
    else:
        draw_by_torch(x, table, operation, unit=unit)


def draw_by_torch(x: Tensor, table: NDArray[np.int64], operation: int, *, unit: bool) -> None:
    """Fill a tensor as ``draw_bits`` does, by torch's operations on int64, on any device."""
    is_double = x.dtype == torch.float64
    index = torch.from_numpy(elements(table)).to(x.device)
    keys = torch.from_numpy(table[:, [KEY0, KEY1]]).to(x.device)
    k0, k1 = keys.repeat_interleave(torch.from_numpy(table[:, NUM_RUNS] * table[:, LENGTH]).to(x.device), dim=0).unbind(1)
    block = index >> (1 if is_double else 2)
    words = torch.stack(
        _philox(block & _MASK, block >> 32, torch.full_like(block, operation), torch.zeros_like(block), k0, k1)
    )
    if is_double:
        pair = 2 * (index & 1)
        low, high = (words.gather(0, (pair + lane)[None])[0] for lane in (0, 1))
        signed = (high - ((high >> 31) << 32) << 32) | low
        x.copy_(((signed >> (12 if unit else 11)).double() + 0.5) * 2.0**-52 + (0.5 if unit else 0.0))
    else:
        word = words.gather(0, (index & 3)[None])[0]
        signed = word - ((word >> 31) << 32)
        x.copy_(((signed >> (9 if unit else 8)).float() + 0.5) * 2.0**-23 + (0.5 if unit else 0.0))


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on 32-bit words in int64; the product of two words wraps around, but its bits are right."""
    (m0, m1), (w0, w1) = philox.MULTIPLIERS, philox.WEYL
    for _ in range(philox.ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + w0 & _MASK, k1 + w1 & _MASK
    return c0, c1, c2, c3
