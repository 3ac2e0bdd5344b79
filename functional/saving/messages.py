"""Boxes of tensors as messages between ranks, none of them too large."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

    from ...specs.stored import Box

MESSAGE_BYTES = 32 * 2**20
"""What travels at a time, at most."""


def messages(there: Box, own: Box, item_bytes: int) -> Iterator[tuple[Box, Box]]:
    """Cut a box along its first axes, so that no message is too large."""
    if not there:
        yield there, own
        return
    (first, last), *rest = there
    row_bytes = item_bytes * prod(stop - start for start, stop in rest)
    step = max(1, MESSAGE_BYTES // row_bytes)
    for start in range(first, last, step):
        stop = min(start + step, last)
        mine = (start - first + own[0][0], stop - first + own[0][0])
        for some, others in messages(tuple(rest), own[1:], item_bytes) if row_bytes > MESSAGE_BYTES else [(rest, own[1:])]:
            yield ((start, stop), *some), (mine, *others)


def narrowed(tensor: Tensor, box: Box) -> Tensor:
    """Return a box of a tensor, without a copy."""
    for axis, (start, stop) in enumerate(box):
        tensor = tensor.narrow(axis, start, stop - start)
    return tensor


def messages_on() -> torch.device:
    """Return where messages are: NCCL sends from the current device, gloo from the CPU."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
