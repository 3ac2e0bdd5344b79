"""A tensor on the CPU as the bytes that a file has of it, and their position sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checksum import position_sum

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64, 16: torch.uint64}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous."""
    elements: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(elements)


def sum_of(tensor: Tensor) -> int:
    """Return the position sum of a tensor.

    >>> sum_of(torch.tensor([7, 0, 2], dtype=torch.int16))
    17
    """
    return position_sum(tensor.contiguous().view(-1).view(_UNSIGNED[tensor.element_size()]).numpy()) if tensor.numel() else 0
