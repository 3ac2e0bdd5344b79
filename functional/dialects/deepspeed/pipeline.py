"""A stage as DeepSpeed's ``PipelineModule`` wants it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...pipeline.stage_module import facts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....specs.pipeline import Activation, Stage
    from ..handover import Handover

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes: what floating-point numbers travel as if no gradient comes back for them."""


def to_pipeline_module(handover: Handover, topology: Any) -> Any:
    """Return a ``PipelineModule`` around this rank's stage.

    Its list of layers has one for each stage; those of other stages are placeholders, which it never builds. Tensors that
    several stages hold are told to it by overriding the method that its engine asks for them: its own ``TiedLayerSpec``
    needs whole layers that it builds itself.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule

    # the process group is there; a PipelineModule asks DeepSpeed for it before deepspeed.initialize has told it
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    plan, (stage,) = handover.plan, handover.modules
    assert plan.pipeline is not None, "only a plan with stages comes here"
    tied = [(parameter, group) for parameter, _, group in handover.tied]

    class StagePipeline(PipelineModule):
        """A ``PipelineModule`` that sums the gradients of what stages hold in common."""

        def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
            return list(tied)

    layers: list[nn.Module] = [nn.Identity() for _ in plan.stages]
    layers[facts_of(stage).number] = _Layer(stage, plan.stages)
    module = StagePipeline(
        layers=layers,
        topology=topology,
        loss_fn=handover.loss_fn,
        partition_method="uniform",
        dynamic_shape=bool(plan.pipeline.sizes or plan.pipeline.chain),
    )
    for parameter, is_owner, _ in handover.tied:
        parameter.ds_pipe_replicated = not is_owner  # else the gradient norm counts every copy
    return module


def mend_buffers(engine: Any) -> None:
    """Let a pipeline engine receive into buffers of the right dtype.

    DeepSpeed 0.19 keeps one buffer for each place in a message, for activations and gradients alike, and looks at its
    length alone when it uses it again: with integers among the activations, gradients are received as integers, or the
    process is aborted.
    """
    kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def allocate(place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_elements = prod(shape)
        if (place, dtype) not in kept or kept[place, dtype].numel() < num_elements:
            kept[place, dtype] = torch.empty(num_elements, dtype=dtype, device=engine.device)
        return kept[place, dtype][:num_elements].view(tuple(shape))

    engine._allocate_or_extend_buffers = allocate  # noqa: SLF001


class _Layer(nn.Module):
    """A stage between DeepSpeed's messages, which are one tensor or a tuple of contiguous ones.

    DeepSpeed takes every floating-point tensor for one whose gradient comes back, and NCCL sends no booleans: both travel
    as integers of the same bits.
    """

    def __init__(self, stage: Any, planned: Sequence[Stage]) -> None:
        super().__init__()
        self.stage, self._planned = stage, planned[facts_of(stage).number]
        number = facts_of(stage).number
        self._is_first, self._is_last = number == 0, number == len(planned) - 1

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Any:
        given = (inputs,) if isinstance(inputs, Tensor) else inputs
        if not self._is_first:
            given = tuple(_unpacked(tensor, planned) for tensor, planned in zip(given, self._planned.inputs, strict=True))
        outputs = self.stage(*given)
        if self._is_last:
            return outputs
        packed = tuple(_packed(tensor, planned) for tensor, planned in zip(outputs, self._planned.outputs, strict=True))
        return packed[0] if len(packed) == 1 else packed


def _packed(tensor: Tensor, planned: Activation) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    if tensor.is_floating_point() and not planned.requires_grad:
        return tensor.detach().view(_INTEGERS[tensor.element_size()])
    return tensor


def _unpacked(tensor: Tensor, planned: Activation) -> Tensor:
    dtype = getattr(torch, planned.dtype)
    was_packed = dtype == torch.bool or (dtype.is_floating_point and not planned.requires_grad)
    return tensor.view(dtype) if was_packed else tensor
