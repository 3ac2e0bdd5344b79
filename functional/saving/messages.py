"""Messages between ranks: boxes of tensors, none too large, and agreement on errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..interpreter.world import agree

if TYPE_CHECKING:
    from torch import Tensor

    from ...specs.plan import Plan
    from ...specs.stored import Box

MESSAGE_BYTES = 32 * 2**20
"""Largest message."""


@contextmanager
def agreement(plan: Plan) -> Iterator[None]:
    """Run a block on every rank, then agree: the first error of any rank is raised on all ranks."""
    error: Exception | None = None
    try:
        yield
    except Exception as failed:  # noqa: BLE001  the other ranks wait for the agreement
        error = failed
    agree(plan, error, messages_on())


def messages(there: Box, own: Box, item_bytes: int) -> Iterator[tuple[Box, Box]]:
    """Cut a box, at the receiver and at the sender, along its first axes into messages of at most ``MESSAGE_BYTES``."""
    if not there:
        yield there, own
        return
    (first, last), *rest = there
    row_bytes = item_bytes * prod(stop - start for start, stop in rest)
    step = max(1, MESSAGE_BYTES // row_bytes)
    for start in range(first, last, step):
        stop = min(start + step, last)
        mine = (start - first + own[0][0], stop - first + own[0][0])
        inner = messages(tuple(rest), own[1:], item_bytes) if row_bytes > MESSAGE_BYTES else [(rest, own[1:])]
        for there_rest, own_rest in inner:
            yield ((start, stop), *there_rest), (mine, *own_rest)


def view_box(tensor: Tensor, box: Box) -> Tensor:
    """Return a box of a tensor as a view."""
    for axis, (start, stop) in enumerate(box):
        tensor = tensor.narrow(axis, start, stop - start)
    return tensor


def messages_on() -> torch.device:
    """Return the device of messages: NCCL sends from the current CUDA device, gloo from the CPU."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def as_message(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor as bytes on the device of messages."""
    return tensor.to(messages_on()).contiguous().view(-1).view(torch.uint8)


def receive(shape: tuple[int, ...], dtype: torch.dtype, sender: int) -> Tensor:
    """Receive a tensor from a rank, on the device of messages."""
    message = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8, device=messages_on())
    dist.recv(message, src=sender)
    return message.view(dtype).view(shape)


def all_texts(text: str) -> list[str]:
    """Gather the texts of all ranks on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    num_ranks, device, mine = dist.get_world_size(), messages_on(), text.encode()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
    room = max(int(size) for size in sizes)
    sent = torch.zeros(room, dtype=torch.uint8)
    sent[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else sent[:0]
    texts = [torch.zeros(room, dtype=torch.uint8, device=device) for _ in range(num_ranks)]
    dist.all_gather(texts, sent.to(device))
    return [bytes(t.cpu().numpy())[: int(size)].decode() for t, size in zip(texts, sizes, strict=True)]
