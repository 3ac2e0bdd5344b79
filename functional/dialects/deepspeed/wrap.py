"""Hand modules to DeepSpeed: its engine around the module, or around a stage as its ``PipelineModule``."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from attrs import frozen
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from frozendict import frozendict
from torch import Tensor, nn

from ....specs.json_values import thawed
from ....specs.mesh import Mesh, MeshAxis
from ...pipeline.stage_module import facts_of
from ..handover import Handover, Wrapped, norm_shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ....specs.pipeline import Activation, Stage

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes: floating-point tensors without a gradient are sent as these."""


def wrap(handover: Handover) -> Wrapped:
    """Return the engine that ``deepspeed.initialize`` makes of this rank's module or stage."""
    (module,), plan = handover.modules, handover.plan
    if handover.device.type == "cpu":
        # else a C++ build of a minute for an all-reduce in shared memory; gloo does it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for parameter, share in norm_shares(module, plan, plan.mesh.coordinate(dist.get_rank())):
        if share.is_split and share.parts is None:
            # read by DeepSpeed's is_model_parallel_parameter, so that the gradient norm counts every part once:
            # without it a parameter counts on the first rank along 'tensor' alone, which holds no second copy
            parameter.model_parallel = True
            parameter.tensor_model_parallel = True
    initialize: Any = deepspeed.initialize  # its annotation of model_parameters is wrong
    engine, made, dataloader, scheduler = initialize(
        model=_to_pipeline_module(handover, to_topology(plan.mesh)) if plan.pipeline else module,
        model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        optimizer=handover.optimizer,
        config=thawed(plan.config),
        mpu=None if plan.pipeline else MeshUnit(plan.mesh, handover.groups),
        dist_init_required=False,
    )
    if plan.pipeline:
        _mend_buffers(engine)
    return Wrapped(engine, made, frozendict(dataloader=dataloader, lr_scheduler=scheduler), norm=_EngineNorm(engine))


@frozen
class _EngineNorm:
    """The gradient's norm as an engine knows it.

    Args:
        engine: The engine.
    """

    engine: Any

    def norm(self) -> Any:
        """Return the norm of the gradient of its last step; None before the first, and where the engine takes none."""
        return self.engine.get_global_grad_norm()

    def clip(self, max_norm: float) -> Any:
        """Refuse: the engine clips in its step."""
        msg = f"DeepSpeed clips in its own step: plan with config={{'gradient_clipping': {max_norm}, ...}}"
        raise NotImplementedError(msg)


def _to_pipeline_module(handover: Handover, topology: Any) -> Any:
    """Return a ``PipelineModule`` around this rank's stage.

    Its list has a layer for each stage; layers of other stages are placeholders, which it never builds. Its engine asks
    ``get_tied_weights_and_groups`` for tensors that several stages hold; the method is overridden, as DeepSpeed's own
    ``TiedLayerSpec`` needs whole layers that it builds itself.
    """
    # the process group is there; a PipelineModule asks DeepSpeed for it before deepspeed.initialize has told it
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    plan, (stage,) = handover.plan, handover.modules
    assert plan.pipeline is not None, "only a plan with stages comes here"
    tied = [(parameter, group) for parameter, _, group in handover.tied]

    class StagePipeline(PipelineModule):
        """A ``PipelineModule`` that sums the gradients of tensors that several stages hold."""

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


def _mend_buffers(engine: Any) -> None:
    """Let a pipeline engine receive into buffers of the right dtype.

    DeepSpeed 0.19 keeps a buffer for each place in a message, shared by activations and gradients, and checks its length
    alone before it uses it again: with integers among the activations, gradients are received as integers, or the process
    is aborted.
    """
    kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def allocate(place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_elements = prod(shape)
        if (place, dtype) not in kept or kept[place, dtype].numel() < num_elements:
            kept[place, dtype] = torch.empty(num_elements, dtype=dtype, device=engine.device)
        return kept[place, dtype][:num_elements].view(tuple(shape))

    engine._allocate_or_extend_buffers = allocate  # noqa: SLF001


@frozen
class MeshUnit:
    """The mesh as DeepSpeed's ``mpu``: sizes, places and groups of model and data parallelism.

    Without a pipeline the model-parallel group is the group along ``tensor``.
    """

    mesh: Mesh
    groups: Mapping[tuple[MeshAxis, ...], Any]

    def get_model_parallel_rank(self) -> int:
        """Place along ``tensor``."""
        return self._index("tensor")

    def get_model_parallel_world_size(self) -> int:
        """Ranks along ``tensor``."""
        return self.mesh.tensor

    def get_model_parallel_group(self) -> Any:
        """Process group along ``tensor``."""
        return self.groups[("tensor",)]

    def get_data_parallel_rank(self) -> int:
        """Place along ``data``."""
        return self._index("data")

    def get_data_parallel_world_size(self) -> int:
        """Ranks along ``data``."""
        return self.mesh.data

    def get_data_parallel_group(self) -> Any:
        """Process group along ``data``."""
        return self.groups[("data",)]

    # deepspeed.checkpointing.configure asks for these names
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def _index(self, mesh_axis: MeshAxis) -> int:
        return self.mesh.coordinate(dist.get_rank()).index(mesh_axis)


def to_topology(mesh: Mesh) -> Any:
    """Return DeepSpeed's ``PipeModelDataParallelTopology`` of a mesh; ``tensor`` is its ``model``."""
    return PipeModelDataParallelTopology(num_pp=mesh.pipe, num_mp=mesh.tensor, num_dp=mesh.data)


def from_topology(topology: Any) -> Mesh:
    """Return the mesh of a DeepSpeed topology.

    Raises:
        ValueError: If its axes are not pipe, data and model, in this order, by which a mesh numbers its ranks.
    """
    axes = list(topology.get_axis_names())
    if axes != ["pipe", "data", "model"]:
        msg = f"a topology with axes {axes} numbers its ranks otherwise; a mesh has pipe, data, model, in this order"
        raise ValueError(msg)
    return Mesh(pipe=topology.get_dim("pipe"), data=topology.get_dim("data"), tensor=topology.get_dim("model"))


class _Layer(nn.Module):
    """A stage between DeepSpeed's messages, each a contiguous tensor or a tuple of contiguous tensors.

    DeepSpeed expects a gradient for every floating-point tensor that it sends, and NCCL sends no booleans: booleans and
    floating-point tensors without a gradient are sent as integers of the same bits.
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
