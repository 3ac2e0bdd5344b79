"""Gather whole tensors on rank 0, one after another, from the shards of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...specs.dtypes import num_bytes
from ...specs.index import index_shape
from ...specs.ownership import clip, holders, local_boxes
from ...specs.plan import Plan
from ..dialects import dialect_of
from ..interpreter.world import agree, own_coordinate
from .held_tensors import held_tensors
from .messages import agreement, as_message, messages, messages_on, receive, view_box

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec
    from ...specs.stored import Box


def gather(plan: Plan, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over whole tensors on rank 0; every rank of the mesh iterates to the end, and ranks but 0 get nothing.

    ::

        for path, tensor in gather(plan, model):  # on rank 0; tensor is on the CPU
            print(path, tensor.norm())

    Besides the tensors that the loop keeps, rank 0 holds one whole tensor at a time and a message of 32 MiB;
    ``dict(gather(plan, model))`` holds all tensors. Each has its ``orig_shape``: padding is left out, and an element that
    several ranks hold is taken from the first. If rank 0 leaves the loop, it still receives the remaining messages, and
    drops them.

    Args:
        plan: The executed plan.
        model: The model that ``execute`` returned.

    Raises:
        PlanError: In a single process, if the model differs from the plan.
        ExecutionError: On every rank, with the first error of any rank.
    """
    held, here = agreed(plan, model)
    is_wanted, error, holding = here.rank == 0, None, dialect_of(plan.target).holding()
    for spec in plan.tree.values():
        if spec.kind == "non_persistent_buffer":
            continue
        whole: Tensor | None = None
        try:
            whole = torch.empty(spec.orig_shape, dtype=getattr(torch, spec.dtype)) if is_wanted else None
        except RuntimeError as no_room:
            is_wanted, error = False, no_room
        try:
            with holding.gathered(held.get(spec.path)):
                collect(spec, tuple((0, size) for size in spec.orig_shape), held.get(spec.path), here, whole)
        except Exception as failed:  # noqa: BLE001  the other ranks wait for the messages still to come
            is_wanted, error = False, error or failed
        if whole is not None and is_wanted:
            try:
                yield spec.path, whole
            except GeneratorExit:
                is_wanted = False
        del whole
    agree(plan, error, messages_on())


def agreed(plan: Plan, model: Any) -> tuple[Mapping[str, Tensor], Coordinate]:
    """Return the tensors that this rank holds, and its coordinate, once all ranks hold their tensors as planned."""
    if not isinstance(plan, Plan):
        msg = f"the plan comes first, and this is a {type(plan).__name__}: save_checkpoint(plan, model, folder)"
        raise TypeError(msg)
    here, error = own_coordinate(plan)
    held: Mapping[str, Tensor] = {}
    with agreement(plan):
        if error is not None:
            raise error
        held = held_tensors(plan, model, here)
    return held, here


def collect(spec: ParamSpec, box: Box, local: Tensor | None, here: Coordinate, whole: Tensor | None) -> None:
    """Fill a box of a tensor on rank 0; every rank calls it, whether it holds a part of the tensor or not.

    A rank that cannot send a message sends zeros in its place, so that no rank waits for it, and raises at the end.

    Args:
        spec: The tensor.
        box: The box.
        local: This rank's shard, padding included; None if it has none.
        here: This rank's coordinate.
        whole: On rank 0 the destination on the CPU, of the box's shape; None there to drop the messages.

    Raises:
        Exception: The error that kept this rank from sending its part.
    """
    dtype: torch.dtype = getattr(torch, spec.dtype)
    error: Exception | None = None
    for rank, index in holders(spec, here.mesh):
        wanted = clip(index, box)
        if 0 in index_shape(wanted) or here.rank not in (0, rank):
            continue
        for there, own in local_boxes(spec, here.mesh.coordinate(rank), wanted):
            inside = tuple((start - low, stop - low) for (start, stop), (low, _) in zip(there, box, strict=True))
            for row, mine in messages(inside, own, num_bytes(spec.dtype)):
                shape = tuple(stop - start for start, stop in row)
                if here.rank != rank:
                    part = receive(shape, dtype, rank)
                else:
                    try:
                        message = as_message(_own_part(spec, local, mine))
                    except Exception as failed:  # noqa: BLE001  rank 0 waits for the message
                        error, message = error or failed, as_message(torch.zeros(shape, dtype=dtype))
                    if rank:
                        dist.send(message, dst=0)
                    part = message.view(dtype).view(shape)
                if whole is not None:
                    view_box(whole, row).copy_(part)
    if error is not None:
        raise error


def _own_part(spec: ParamSpec, local: Tensor | None, box: Box) -> Tensor:
    """Return a box of this rank's shard as a view."""
    if local is None:
        msg = f"{spec}: it is not there"
        raise ValueError(msg)
    return view_box(local.detach(), box)
