"""What executing a plan gives on one rank: the model, its optimizer, and what a training loop asks them for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from ..specs.plan import Plan
from .guards.draws import same_draws
from .guards.error import TrainingError
from .guards.parameters import is_fsdp
from .saving.gather import gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ..specs.receipt import Receipt
    from .dialects.handover import Norm


@frozen
class Built:
    """The result of executing a plan on one rank; unpacks as ``model, optimizer``.

    Args:
        plan: The plan.
        model: The model to train: the module, or the target's engine around it. None with effects of the caller's.
        optimizer: The target's optimizer, or the given one; None if there is none.
        module: This rank's own torch module: the whole model's, or that of its (first) pipeline stage.
        modules: All of this rank's stages, several under an interleaved pipeline; else the one module.
        extras: Whatever else the target returned, by name.
        device_mesh: The device mesh of ``layout="dtensor"``, with dimensions ``data`` and ``tensor``; else None.
        receipt: What this rank really allocated, sent and placed.
        norm: The norm of the whole model's gradient; None if the target knows none.
        tensor_group: The group along ``tensor``; None if nothing is sent there.
    """

    plan: Plan = field(repr=False)
    model: Any
    optimizer: Any
    module: nn.Module | None = field(repr=False)
    modules: tuple[nn.Module, ...] = field(repr=False)
    extras: Any = field(repr=False)
    device_mesh: DeviceMesh | None = field(repr=False)
    receipt: Receipt
    norm: Norm | None = field(default=None, repr=False)
    tensor_group: ProcessGroup | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.optimizer))

    def clip_grad_norm_(self, max_norm: float) -> Any:
        """Scale all gradients so that their norm, over the whole model, is at most ``max_norm``; return the norm before.

        As ``torch.nn.utils.clip_grad_norm_`` of the unsplit model; torch's own would take this rank's parts for the model.
        Every rank calls it, after the backward pass.

        Raises:
            NotImplementedError: If the target clips by itself, as DeepSpeed does.
            TrainingError: If nothing joins the ranks that hold parts, or FSDP2 holds the parameters.
        """
        return self._known_norm().clip(max_norm)

    def grad_norm(self) -> Any:
        """Return the norm of the whole model's gradient; every rank calls it, after the backward pass.

        DeepSpeed's engine knows that of its last step.

        Raises:
            TrainingError: If nothing joins the ranks that hold parts, or FSDP2 holds the parameters.
        """
        return self._known_norm().norm()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Keep gradients of this rank's own batches within the block: the first backward pass after it averages all.

        Targets that average nothing by themselves give a block that changes nothing.
        """
        return self.model.no_sync() if hasattr(self.model, "no_sync") else nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole model's tensors on rank 0, on the CPU, by all their paths; nothing on the other ranks.

        Every rank calls it. One tensor at a time is gathered; rank 0 needs host memory for all of them.
        """
        whole = dict(gather(self.plan, self.model))
        return {path: whole[spec.path] for spec in self.plan.tree.values() for path in spec.paths if spec.path in whole}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Let the module generate, as transformers' ``generate``: ranks along ``tensor`` draw the same tokens.

        They are given the same arguments, and draw with a seed that the first of them has drawn.

        Raises:
            TrainingError: If the module generates nothing, as stages of a pipeline.
        """
        if self.module is None or not hasattr(self.module, "generate"):
            msg = "the module has no generate: it is a stage of a pipeline, or no model of transformers that generates"
            raise TrainingError(msg)
        device = next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))
        with same_draws(self.tensor_group, device):
            generate: Any = self.module.generate
            return generate(*args, **kwargs)

    def _known_norm(self) -> Norm:
        if self.norm is None:
            msg = "nothing joins the ranks that hold parts of the gradient: plan with target='torch' or 'deepspeed'"
            raise TrainingError(msg)
        if any(is_fsdp(inner) for module in self.modules for inner in module.modules()):
            msg = (
                "FSDP2 holds the parameters, as DTensors: torch.nn.utils.clip_grad_norm_(module.parameters(), ...) is right"
            )
            raise TrainingError(msg)
        return self.norm
