"""What a pipeline keeps of the tensors that cross between stages, and of what stages give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .boundary_traffic import first_sizes, is_partitioned
from .microbatches import num_microbatches
from .pipeline_schedules import in_flight, moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....specs.mesh import Coordinate
    from ....specs.pipeline import Activation
    from ....specs.plan import Plan

_PLACEHOLDER_BYTES = 4
"""What stays of an output of which a part is kept: one float32."""


def boundary_bytes(plan: Plan, coordinate: Coordinate) -> int:
    """Return the bytes that a runtime allocates for what crosses between stages, and keeps of what stages give, on one rank.

    At the sizes of the example inputs. What a stage is given is among it; autograd may keep that very tensor. Batches and
    targets are not.
    """
    if not plan.pipeline or plan.target is None:
        return 0
    return _deepspeed(plan, coordinate) if plan.target == "deepspeed" else _torch(plan, coordinate)


def _torch(plan: Plan, coordinate: Coordinate) -> int:
    """There is room to receive every micro-batch, and every gradient; outputs are kept until they went backward.

    ``args_recv_info``, ``grad_recv_info`` and ``fwd_cache`` in torch/distributed/pipelining/stage.py of torch 2.13.
    """
    num, stages, received = num_microbatches(plan), plan.stages, 0
    for number in range(coordinate.pipe, len(stages), plan.mesh.pipe):
        received += num * stages[number - 1].output_bytes if number else 0
        received += num * _total(_back(stages[number].outputs)) if number < len(stages) - 1 else 0
    given = (
        sum(num_kept * stages[number].output_bytes for number, num_kept in kept.items())
        for kept in moments(plan, coordinate.pipe)
    )
    return received + max(given)


def _deepspeed(plan: Plan, coordinate: Coordinate) -> int:
    """DeepSpeed receives into buffers that it uses again, and copies each micro-batch from them.

    ``pipe_buffers`` in runtime/pipe/engine.py of DeepSpeed 0.19.8: inputs until their gradient is sent, outputs until they
    went backward; on the last stage they stay until their slot is used again, and there are two.
    """
    number, num, kept = coordinate.pipe, num_microbatches(plan), in_flight(plan, coordinate.pipe)
    outputs, is_last = plan.stages[number].outputs, number == len(plan.stages) - 1
    inputs = plan.stages[number - 1].outputs if number else ()
    total = _receive_bytes(plan, coordinate, inputs, () if is_last else outputs)
    total += kept * _total(inputs) + _total(_back(inputs))
    if is_last:
        return total + min(2, num) * _total(outputs)
    if not is_partitioned(plan):
        return total + kept * _total(outputs)
    parts = sum(first_sizes(plan, coordinate, outputs[0])) + _total(outputs[1:])
    return total + kept * parts + outputs[0].num_bytes + (kept - 1) * _PLACEHOLDER_BYTES  # one is whole again at a time


def _receive_bytes(plan: Plan, coordinate: Coordinate, inputs: Sequence[Activation], outputs: Sequence[Activation]) -> int:
    """One buffer for each place in a message and each dtype, for activations and gradients alike (``mend_buffers``).

    Where shapes never change, the buffer for activations is kept although a larger one for gradients takes its place.
    """
    assert plan.pipeline is not None, "the caller has looked"
    first = _places(plan, coordinate, inputs)
    back = _places(plan, coordinate, _back(outputs))
    changes = bool(plan.pipeline.sizes or plan.pipeline.chain)
    total = 0
    for key in {**first, **back}:
        forward, backward = first.get(key, 0), back.get(key, 0)
        total += max(forward, backward) if changes or backward <= forward else forward + backward
    return total


def _places(plan: Plan, coordinate: Coordinate, tensors: Sequence[Activation]) -> dict[tuple[int, str], int]:
    """Return the bytes of each part of a message, by its place and what it travels as (deepspeed_pipeline.py)."""
    found: list[tuple[str, int]] = []
    for tensor in tensors[:1]:
        *cut, size = first_sizes(plan, coordinate, tensor)
        found += [*(("int64", num) for num in cut), (_travels_as(tensor), size)]
    found += [(_travels_as(tensor), tensor.num_bytes) for tensor in tensors[1:]]
    return {(place, dtype): size for place, (dtype, size) in enumerate(found)}


def _travels_as(tensor: Activation) -> str:
    """Return a dtype; what has no gradient travels as integers of as many bytes."""
    if tensor.requires_grad:
        return tensor.dtype
    return {"bool": "uint8", "float16": "int16", "bfloat16": "int16", "float32": "int32", "float64": "int64"}.get(
        tensor.dtype, tensor.dtype
    )


def _back(tensors: Sequence[Activation]) -> list[Activation]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def _total(tensors: Sequence[Activation]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
