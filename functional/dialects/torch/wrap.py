"""Hand modules to torch: ``DistributedDataParallel`` over ``data``, and ``torch.distributed.pipelining`` over stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from ....specs.mesh import MESH_AXES
from ...pipeline.stage_module import check_inputs, facts_of
from ..gradient_norm import GradientNorm
from ..handover import Wrapped, split_experts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ....specs.pipeline import Activation, Pipeline
    from ..handover import Handover

_INPUTS_WRONG = "another rank was given inputs or a target that are not as planned"
_LOSS_FAILED = "the loss function raised on a rank of the last stage"
_TENSOR = object()
"""Stands for a tensor in the output of a stage."""

_SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved_1f1b": ScheduleInterleaved1F1B}


_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute in which DDP keeps the paths that it ignores."""


def wrap(handover: Handover) -> Wrapped:
    """Return DDP around the module, or a pipeline around this rank's stages, with the optimizer and the gradient's norm."""
    norm, optimizer = GradientNorm.of(handover), _make_optimizer(handover)
    if handover.plan.pipeline:
        return Wrapped(TorchPipeline(handover), optimizer, norm=norm)
    _ignore(handover.modules[0], split_experts(handover.plan))
    return Wrapped(_replicated(handover.modules[0], handover), optimizer, norm=norm)


def _make_optimizer(handover: Handover) -> Any:
    """Return the caller's optimizer, or the optimizer that the plan's configuration names, if any."""
    section = (handover.plan.config or {}).get("optimizer")
    if handover.optimizer is not None or section is None:
        return handover.optimizer
    found = dict.fromkeys(parameter for module in handover.modules for parameter in module.parameters())
    trained = [parameter for parameter in found if parameter.requires_grad]
    return getattr(torch.optim, section["type"])(trained, **section.get("params", {}))


def _ignore(module: nn.Module, paths: list[str]) -> None:
    """Let DDP neither average nor compare some parameters."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, paths)  # noqa: SLF001  torch's name for it


def _replicated(module: nn.Module, handover: Handover) -> nn.Module:
    """Return a module whose gradients are averaged over ``data``; the plan has made its values equal already."""
    ignored = getattr(module, _IGNORED, [])
    averaged = (p for name, p in module.named_parameters() if name not in ignored)
    if handover.plan.mesh.data == 1 or not any(parameter.requires_grad for parameter in averaged):
        return module
    return DistributedDataParallel(module, process_group=handover.groups["data",], init_sync=False)


class TorchPipeline:
    """Train the stages of a plan, this rank's among them; every rank of the mesh makes the same calls.

    ::

        for inputs, target in batches:  # this data rank's own
            loss = model.train_batch(inputs, target=target)
            built.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()

    Args:
        handover: This rank's stages, and the plan, groups and loss that they train with.
    """

    def __init__(self, handover: Handover) -> None:
        plan = handover.plan
        assert plan.pipeline is not None, "only a plan with stages comes here"
        assert plan.config is not None, "the plan was checked"
        self.modules = handover.modules
        self._pipeline: Pipeline = plan.pipeline
        self._handover = handover
        self._num_microbatches: int = plan.config["num_microbatches"]
        self._schedule_type: Any = _SCHEDULES[plan.config.get("schedule", "1f1b")]
        self._flat = [_Flat(module) for module in handover.modules]
        for flat in self._flat:
            # DDP would wait for gradients of tensors that no operation reads
            _ignore(flat, [f"stage.{path}" for path in (*facts_of(flat.stage).unused, *split_experts(plan))])
        self._replicated = [_replicated(module, handover) for module in self._flat]
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._group = handover.groups.get(("pipe",))
        self._has_target = False
        self._error: Exception | None = None

    def train_batch(self, *inputs: Tensor, target: Tensor | None = None) -> Tensor:
        """Run all micro-batches forward and backward, sum the gradients of tied tensors, and return the mean loss.

        Gradients are accumulated; the caller steps the optimizer.

        Args:
            inputs: The model's inputs in the order of ``example_inputs``, all micro-batches of this data rank along axis 0;
                read on ranks of the first stage alone.
            target: The target of the loss, along axis 0 too; read on ranks of the last stage alone.

        Returns:
            The mean over micro-batches and data ranks, on every rank.

        Raises:
            ValueError: On every rank, if on any rank the inputs or the target do not divide into equal micro-batches, or
                inputs have other sizes than planned.
            Exception: On every rank, if the loss raises: its error on ranks of the last stage, elsewhere a RuntimeError.
        """
        for module in self.modules:
            module.train()
        schedule = self._schedule(inputs, target)
        before = [parameter.grad for parameter, *_ in self._handover.tied]
        for parameter, *_ in self._handover.tied:
            parameter.grad = None  # gradients of an earlier call were summed by it
        loss = self._run(schedule.step, inputs, target)
        for (parameter, _, group), summed in zip(self._handover.tied, before, strict=True):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad, group=group)
            if summed is not None:
                parameter.grad += summed
        return loss

    def eval_batch(self, *inputs: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the mean loss of all micro-batches without gradients; arguments as for ``train_batch``."""
        for module in self.modules:
            module.eval()
        schedule = self._schedule(inputs, target)
        with torch.no_grad():
            return self._run(schedule.eval, inputs, target)

    @property
    def _is_first(self) -> bool:
        return any(facts_of(module).number == 0 for module in self.modules)

    @property
    def _is_last(self) -> bool:
        return any(facts_of(module).number == len(self._pipeline.stages) - 1 for module in self.modules)

    def _run(self, step: Callable[..., Any], inputs: Sequence[Tensor], target: Tensor | None) -> Tensor:
        """Run a schedule; return the mean loss on every rank, or raise on every rank if the loss raised."""
        losses: list[Tensor] = []
        self._has_target, self._error = target is not None, None
        chunked = torch.empty(self._num_microbatches) if target is None else target  # the schedule cuts a target in any case
        step(*(inputs if self._is_first else ()), target=chunked, losses=losses, return_outputs=False)
        device = self._handover.device
        loss = torch.stack([loss.detach().float() for loss in losses]).sum() if losses else torch.zeros((), device=device)
        message = torch.stack([loss, torch.full_like(loss, float(self._error is not None))])
        if self._group is not None:
            last = (len(self._pipeline.stages) - 1) % dist.get_world_size(self._group)
            dist.broadcast(message, group_src=last, group=self._group)
        if self._handover.plan.mesh.data > 1:
            dist.all_reduce(message, group=self._handover.groups["data",])
        if message[1] > 0:
            raise self._error or RuntimeError(_LOSS_FAILED)
        return message[0] / self._handover.plan.mesh.data

    def _schedule(self, inputs: Sequence[Tensor], target: Tensor | None) -> Any:
        """Return the schedule for micro-batches of the sizes that the first stage sends to all others."""
        sizes = self._sizes(inputs, target)
        if sizes not in self._schedules:
            named = dict(zip((size.name for size in self._pipeline.sizes), sizes, strict=True))
            stages = [self._stage(place, named) for place in range(len(self.modules))]
            several = self._schedule_type is ScheduleInterleaved1F1B
            self._schedules.clear()  # a schedule keeps its buffers
            self._schedules[sizes] = self._schedule_type(
                stages if several else stages[0],
                n_microbatches=self._num_microbatches,
                loss_fn=self._loss,
                scale_grads=False,  # the loss is scaled: gradients of tied tensors would be scaled twice
            )
        return self._schedules[sizes]

    def _sizes(self, inputs: Sequence[Tensor], target: Tensor | None) -> tuple[int, ...]:
        """Return the variable sizes of a micro-batch, on every rank; raise on every rank if a batch is wrong on any."""
        message = torch.zeros(1 + len(self._pipeline.sizes), dtype=torch.int64)
        error: Exception | None = None
        try:
            if self._is_first:
                message[1:] = torch.tensor(self._microbatch(inputs), dtype=torch.int64)
            if self._is_last and target is not None:
                self._num_rows("target", target)
        except (AttributeError, TypeError, ValueError) as wrong:
            message[0], error = 1, wrong
        message = message.to(self._handover.device)
        for mesh_axis in MESH_AXES:
            # sizes are summed over pipe, where the first stage alone has some; over the others the error flag alone
            if (group := self._handover.groups.get((mesh_axis,))) is not None:
                dist.all_reduce(message if mesh_axis == "pipe" else message[:1], group=group)
        is_wrong, *sizes = message.tolist()
        if is_wrong:
            raise error or ValueError(_INPUTS_WRONG)
        return tuple(sizes)

    def _microbatch(self, inputs: Sequence[Tensor]) -> list[int]:
        """Return the variable sizes of a micro-batch."""
        planned = self._pipeline.stages[0].inputs
        rows = {name: self._num_rows(name, tensor) for name, tensor in zip(map(str, planned), inputs, strict=False)}
        parts = tuple(tensor[:num] for tensor, num in zip(inputs, rows.values(), strict=False))
        check_inputs(0, self._pipeline, parts if len(inputs) == len(planned) else tuple(inputs))
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{name} with {num * self._num_microbatches}" for name, num in rows.items())
            msg = f"inputs have different numbers of rows: {listed}"
            raise ValueError(msg)
        sizes = {size.name: size.example for size in self._pipeline.sizes}
        for expected, part in zip(planned, parts, strict=True):
            sizes |= {name: size for name, size in zip(expected.shape, part.shape, strict=True) if name in sizes}  # type: ignore[misc]
        return list(sizes.values())

    def _num_rows(self, name: str, tensor: Tensor) -> int:
        """Return the rows of a micro-batch."""
        num_rows, rest = divmod(tensor.shape[0] if tensor.dim() else 0, self._num_microbatches)
        if rest or not num_rows:
            rows = num_rows * self._num_microbatches + rest
            msg = f"{name} has {rows} rows for {self._num_microbatches} micro-batches, which does not divide"
            raise ValueError(msg)
        return num_rows

    def _stage(self, place: int, sizes: dict[str, int]) -> PipelineStage:
        module: Any = self.modules[place]
        stage = self._pipeline.stages[facts_of(module).number]
        return PipelineStage(
            self._replicated[place],
            facts_of(module).number,
            len(self._pipeline.stages),
            self._handover.device,
            input_args=tuple(_like(activation, sizes) for activation in stage.inputs),
            output_args=tuple(_like(activation, sizes) for activation in stage.outputs),
            group=self._group,
        )

    def _loss(self, output: Any, target: Any) -> Tensor:
        """Return the user's loss; if it raises, keep the error until all stages are done, as they wait for its gradient."""
        assert self._handover.loss_fn is not None, "the opening agreement checks it"
        tensors = output if isinstance(output, tuple) else (output,)
        last = next(flat for flat in self._flat if facts_of(flat.stage).number == len(self._pipeline.stages) - 1)
        try:
            loss = self._handover.loss_fn(last.returned(tensors), target if self._has_target else None)
            return loss / self._num_microbatches
        except Exception as error:  # noqa: BLE001  the user's code may raise anything
            self._error = self._error or error
            return torch.stack([tensor.sum() * 0.0 for tensor in tensors if tensor.is_floating_point()]).sum()


class _Flat(nn.Module):
    """A stage that returns a tuple of tensors, as torch's pipelining wants of every stage, the last included."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves, self._spec = tree_flatten(self.stage(*inputs))
        self._rest = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def returned(self, tensors: Sequence[Tensor]) -> Any:
        """Return the stage's output, rebuilt from its tensors."""
        found = iter(tensors)
        leaves = [next(found) if leaf is _TENSOR else leaf for leaf in self._rest]
        return tree_unflatten(leaves, self._spec)


def _like(activation: Activation, sizes: dict[str, int]) -> Tensor:
    tensor = torch.empty(activation.shape_in(sizes), dtype=getattr(torch, activation.dtype), device="meta")
    return tensor.requires_grad_(activation.requires_grad)
