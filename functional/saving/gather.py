"""Whole tensors out of what the ranks hold, one after another, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...specs.dtypes import num_bytes
from ...specs.index import index_shape
from ...specs.ownership import clip, holders, local_boxes
from ...specs.plan import Plan
from ..interpreter.world import agree, own_coordinate
from .held_tensors import held_tensors
from .messages import messages, messages_on, narrowed

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec
    from ...specs.stored import Box


def gather(plan: Plan, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over whole tensors on rank 0; every rank of the mesh iterates to the end, and others get nothing.

    ::

        for path, tensor in gather(plan, model):  # on rank 0; tensor is on the CPU
            print(path, tensor.norm())

    Rank 0 holds one whole tensor at a time, what the loop keeps, and a message of 32 MiB; ``dict(gather(plan, model))``
    holds them all. Each has its ``orig_shape``: padding is left out, and what several ranks hold is taken from the first.
    Where rank 0 leaves the loop, what the others still send is received, and dropped.

    Args:
        plan: What was executed.
        model: What ``execute`` returned.

    Raises:
        PlanError: In a single process, if the model is not the planned one.
        ExecutionError: On every rank, with the first error of any rank.
    """
    held, here = agreed(plan, model)
    is_wanted, error = here.rank == 0, None
    for spec in plan.tree.values():
        if spec.kind == "non_persistent_buffer":
            continue
        whole: Tensor | None = None
        try:
            whole = torch.empty(spec.orig_shape, dtype=getattr(torch, spec.dtype)) if is_wanted else None
        except RuntimeError as no_room:
            is_wanted, error = False, no_room
        try:
            collect(spec, tuple((0, size) for size in spec.orig_shape), held.get(spec.path), here, whole)
        except Exception as failed:  # noqa: BLE001  the other ranks wait for what is still to come
            is_wanted, error = False, error or failed
        if whole is not None and is_wanted:
            try:
                yield spec.path, whole
            except GeneratorExit:
                is_wanted = False
        del whole
    agree(plan, error, messages_on())


def agreed(plan: Plan, model: Any) -> tuple[Mapping[str, Tensor], Coordinate]:
    """Return what this rank holds, and where it stands, when all ranks hold what is planned."""
    if not isinstance(plan, Plan):
        msg = f"the plan comes first, and this is a {type(plan).__name__}: save_checkpoint(plan, model, folder)"
        raise TypeError(msg)
    here, error = own_coordinate(plan)
    held: Mapping[str, Tensor] = {}
    try:
        held = held_tensors(plan, model, here)
    except Exception as wrong:  # noqa: BLE001  whatever is wrong here, the other ranks wait for the agreement
        error = error or wrong
    agree(plan, error, messages_on())
    return held, here


def collect(spec: ParamSpec, box: Box, local: Tensor | None, here: Coordinate, whole: Tensor | None) -> None:
    """Fill a box of a tensor on rank 0; every rank calls it, those that hold nothing of it too.

    A rank that cannot send a message sends zeros in its place, so that none waits for it, and raises at the end.

    Args:
        spec: The tensor.
        box: What of it.
        local: What this rank holds of it, padding included; None if it holds nothing.
        here: Where this rank stands.
        whole: On rank 0 what is filled, on the CPU, of the box's shape; None there if nothing is kept of what comes.

    Raises:
        Exception: What kept this rank from sending what it has.
    """
    error: Exception | None = None
    with _given_whole(local):
        for rank, index in holders(spec, here.mesh):
            part = clip(index, box)
            if 0 in index_shape(part) or here.rank not in (0, rank):
                continue
            for there, own in local_boxes(spec, here.mesh.coordinate(rank), part):
                inside = tuple((start - low, stop - low) for (start, stop), (low, _) in zip(there, box, strict=True))
                for row, mine in messages(inside, own, num_bytes(spec.dtype)):
                    into = None if whole is None else narrowed(whole, row)
                    if here.rank != rank:
                        _receive(row, spec.dtype, into, rank)
                        continue
                    try:
                        message = _message(spec, local, mine)
                    except Exception as failed:  # noqa: BLE001  rank 0 waits for the message
                        error, message = error or failed, torch.zeros(_num_bytes(row, spec.dtype), dtype=torch.uint8)
                    if rank:
                        dist.send(message.to(messages_on()), dst=0)
                    elif into is not None:
                        into.copy_(message.view(into.dtype).view(into.shape))
    if error is not None:
        raise error


def _message(spec: ParamSpec, local: Tensor | None, mine: Box) -> Tensor:
    """Return the bytes of a box of what this rank holds, where messages are; on rank 0, which sends none, on the CPU."""
    if local is None:
        msg = f"{spec}: it is not there"
        raise ValueError(msg)
    part = narrowed(local.detach(), mine)
    return (
        part.to(messages_on() if dist.is_initialized() and dist.get_rank() else "cpu")
        .contiguous()
        .view(-1)
        .view(torch.uint8)
    )


def _num_bytes(box: Box, dtype: str) -> int:
    return prod(stop - start for start, stop in box) * num_bytes(dtype)


def _receive(box: Box, dtype: str, into: Tensor | None, sender: int) -> None:
    """Take a message from its sender."""
    shape = tuple(stop - start for start, stop in box)
    message = torch.empty(_num_bytes(box, dtype), dtype=torch.uint8, device=messages_on())
    dist.recv(message, src=sender)
    if into is not None:
        into.copy_(message.cpu().view(getattr(torch, dtype)).view(shape))


def _given_whole(local: Tensor | None) -> AbstractContextManager[Any]:
    """Let a parameter that ZeRO 3 keeps in pieces be whole within the block; all ranks along ``data`` enter it."""
    if not hasattr(local, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([local])
