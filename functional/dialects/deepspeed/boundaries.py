"""Buffers and messages of tensors that cross between DeepSpeed's stages, by the code of its release 0.19.8.

With ``tensor`` DeepSpeed sends only a part of the first tensor of a boundary, unless it is told not to, and gathers it
again along ``tensor``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ....specs.dtypes import num_bytes
from ..accounting.messages import Messages, crossings, with_gradient
from ..accounting.training import mapping
from .config import num_microbatches

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.pipeline import Activation
    from ....specs.plan import Plan

_PLACEHOLDER_BYTES = 4
"""Bytes of the float32 that takes the place of an output while only its part is kept."""

_SENT_AS = {"bool": "uint8", "float16": "int16", "bfloat16": "int16", "float32": "int32", "float64": "int64"}
"""Dtypes that tensors without a gradient are sent as: integers of as many bytes (``wrap.py``)."""


def boundary_messages(plan: Plan, coordinate: Coordinate) -> Iterator[Messages]:
    """Iterate over the messages of one rank between stages, and the gathers of partitioned tensors along ``tensor``.

    Inputs of a stage are gathered before its forward pass, its outputs and their gradients before its backward pass
    (``_exec_forward_pass`` and ``_exec_backward_pass`` in runtime/pipe/engine.py). The shapes that DeepSpeed sends ahead of
    tensors, 1 KiB each time, are left out.
    """
    times, last = num_microbatches(plan), len(plan.stages) - 1
    yield from crossings(plan, coordinate.pipe, times, partial(_sizes, plan, coordinate))
    if not _is_partitioned(plan):
        return
    gathered: list[int] = []
    for number in range(coordinate.pipe, len(plan.stages), plan.mesh.pipe):
        outputs = plan.stages[number].outputs if number < last else ()
        inputs = plan.stages[number - 1].outputs if number else ()
        gathered += [tensor.num_bytes for tensor in (*outputs[:1], *outputs[:1], *inputs[:1])]
    if gathered:
        yield Messages("tensor", "boundary", "all_gather", times * len(gathered), times * sum(gathered))


def in_flight(plan: Plan, stage: int) -> int:
    """Return the largest number of micro-batches whose activations a stage keeps at one time; 1 without a pipeline.

    As many as there are stages from it to the last, if there are so many micro-batches (``num_pipe_buffers`` in
    runtime/pipe/schedule.py).
    """
    return min(num_microbatches(plan), len(plan.stages) - stage) if plan.pipeline else 1


def boundary_bytes(plan: Plan, coordinate: Coordinate) -> int:
    """Return the bytes of buffers for tensors that cross, and of micro-batches copied from them until their backward pass.

    ``pipe_buffers`` in runtime/pipe/engine.py: inputs are kept until their gradient is sent, outputs until their backward
    pass; outputs of the last stage stay until their slot is used again, and there are two slots.
    """
    if not plan.pipeline:
        return 0
    number, num, kept = coordinate.pipe, num_microbatches(plan), in_flight(plan, coordinate.pipe)
    outputs, is_last = plan.stages[number].outputs, number == len(plan.stages) - 1
    inputs = plan.stages[number - 1].outputs if number else ()
    total = _receive_bytes(plan, coordinate, inputs, () if is_last else outputs)
    total += kept * _total(inputs) + _total(with_gradient(inputs))
    if is_last:
        return total + min(2, num) * _total(outputs)
    if not _is_partitioned(plan):
        return total + kept * _total(outputs)
    # a single output is whole at a time, for its backward pass
    return total + kept * sum(_sizes(plan, coordinate, outputs)) + outputs[0].num_bytes + (kept - 1) * _PLACEHOLDER_BYTES


def _receive_bytes(plan: Plan, coordinate: Coordinate, inputs: Sequence[Activation], outputs: Sequence[Activation]) -> int:
    """Return the bytes of receive buffers: a buffer for each place in a message and each dtype.

    Activations and gradients share buffers (``_mend_buffers`` in ``wrap.py``). Where shapes never change, the buffer for
    activations is kept although a larger buffer for gradients takes its place.
    """
    assert plan.pipeline is not None, "the caller has looked"
    first = _places(plan, coordinate, inputs)
    back = _places(plan, coordinate, with_gradient(outputs))
    changes = bool(plan.pipeline.sizes or plan.pipeline.chain)
    total = 0
    for key in {**first, **back}:
        forward, backward = first.get(key, 0), back.get(key, 0)
        total += max(forward, backward) if changes or backward <= forward else forward + backward
    return total


def _places(plan: Plan, coordinate: Coordinate, tensors: Sequence[Activation]) -> dict[tuple[int, str], int]:
    """Return the bytes of each part of a message, by its place in the message and the dtype that it is sent as."""
    sizes = _sizes(plan, coordinate, tensors)
    dtypes = [tensor.dtype if tensor.requires_grad else _SENT_AS.get(tensor.dtype, tensor.dtype) for tensor in tensors]
    if len(sizes) > len(dtypes):
        dtypes.insert(0, "int64")
    return {(place, dtype): size for place, (dtype, size) in enumerate(zip(dtypes, sizes, strict=True))}


def _sizes(plan: Plan, coordinate: Coordinate, tensors: Sequence[Activation]) -> list[int]:
    """Return the bytes of the messages that send tensors over a boundary.

    A partitioned first tensor takes two: its sizes, the ranks and the starts of all parts as int64, and this rank's part
    (``PartitionedTensor`` in runtime/utils.py).
    """
    whole = [tensor.num_bytes for tensor in tensors]
    if not tensors or not _is_partitioned(plan):
        return whole
    num_ranks, item_bytes = plan.mesh.tensor, num_bytes(tensors[0].dtype)
    part, rest = divmod(whole[0] // item_bytes, num_ranks)
    return [8 * (len(tensors[0].shape) + num_ranks + 4), item_bytes * (part + (coordinate.tensor < rest)), *whole[1:]]


def _is_partitioned(plan: Plan) -> bool:
    """Tell whether each rank along ``tensor`` sends a part of the first tensor of a boundary.

    ``grad_partitioned`` needs no look: DeepSpeed fails where it differs from ``pipe_partitioned``.
    """
    options = mapping(mapping(plan.config).get("pipeline"))
    return plan.mesh.tensor > 1 and bool(options.get("pipe_partitioned", True))


def _total(tensors: Sequence[Activation]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
