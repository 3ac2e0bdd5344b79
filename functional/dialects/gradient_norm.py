"""The norm of a gradient that is spread over stages and over parts of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import frozen

from .handover import split_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from .handover import Handover


@frozen
class GradientNorm:
    """Counts every element of the model's gradient once, wherever it is.

    Args:
        counted: The parameters of this rank that count here: its parts of split ones; whole ones on the first rank along
            ``tensor``; what several stages hold on the stage that owns it.
        trained: All trained parameters of this rank.
        groups: The process groups along which the squares are added up.
        device: Where the gradients are.
    """

    counted: Sequence[Any]
    trained: Sequence[Any]
    groups: Sequence[Any]
    device: Any

    @classmethod
    def of(cls, handover: Handover) -> GradientNorm:
        """Return the norm for the modules that a dialect is handed."""
        mesh, rank = handover.plan.mesh, dist.get_rank() if dist.is_initialized() else 0
        is_first = mesh.coordinate(rank).is_first("tensor")
        copies = {id(parameter) for parameter, is_owner, _ in handover.tied if not is_owner}
        split = {id(parameter) for module in handover.modules for parameter in split_parameters(module, handover.plan)}
        found = [parameter for module in handover.modules for parameter in module.parameters()]
        trained = [parameter for parameter in dict.fromkeys(found) if parameter.requires_grad]
        counted = [p for p in trained if id(p) not in copies and (is_first or id(p) in split)]
        groups = [handover.groups[mesh_axis,] for mesh_axis in ("tensor", "pipe") if mesh.num(mesh_axis) > 1]
        return cls(counted, trained, groups, handover.device)

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm, over the whole model, is at most ``max_norm``; return the norm before.

        As ``torch.nn.utils.clip_grad_norm_`` does in one process: by ``max_norm / (norm + 1e-6)`` where that is below 1.
        Every rank calls it.
        """
        gradients = [parameter.grad for parameter in self.counted if parameter.grad is not None]
        squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32).square() for gradient in gradients]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.device)
        for group in self.groups:
            dist.all_reduce(total, group=group)
        norm = total.sqrt()
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.dtype))
        return norm
