"""The norm of a gradient that is spread over stages and shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from attrs import frozen

from ...specs.mesh import BATCH_AXES, MESH_AXES
from .handover import norm_shares

if TYPE_CHECKING:
    from torch import Tensor

    from .handover import Handover, NormShare


@frozen
class GradientNorm:
    """Count every element of the model's gradient once, whichever rank holds it.

    Args:
        shares: The parameters of this rank, each once, with the parts of their gradients that count here: of split
            parameters the rank's own parts, on the first holder where several ranks hold a part; whole parameters count on
            the first of these ranks; parameters that several stages hold count on the stage that owns them.
        parameters: All parameters of this rank. None is kept alive by it.
        groups: The process groups over which the squares are summed.
        experts: The group along ``expert``, for squares of experts; None if experts are not split.
        device: Where the gradients are.
    """

    shares: Sequence[tuple[ref[Any], NormShare]]
    parameters: Sequence[ref[Any]]
    groups: Sequence[Any]
    experts: Any
    device: Any

    @classmethod
    def of(cls, handover: Handover) -> GradientNorm:
        """Return the norm for the modules that a dialect is handed.

        Raises:
            KeyError: If there is no group along a mesh axis over which squares are summed.
        """
        mesh, rank = handover.plan.mesh, dist.get_rank() if dist.is_initialized() else 0
        copies = {id(parameter) for parameter, is_owner, _ in handover.tied if not is_owner}
        found = {
            id(parameter): (parameter, share)
            for module in handover.modules
            for parameter, share in norm_shares(module, handover.plan, mesh.coordinate(rank))
        }
        along = [mesh_axis for mesh_axis in reversed(MESH_AXES) if mesh_axis not in BATCH_AXES and mesh.num(mesh_axis) > 1]
        return cls(
            [(ref(parameter), share) for key, (parameter, share) in found.items() if key not in copies],
            [ref(parameter) for parameter, _ in found.values()],
            [handover.groups[mesh_axis,] for mesh_axis in along],
            handover.groups["expert",] if mesh.expert > 1 else None,
            handover.device,
        )

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm, over the whole model, is at most ``max_norm``; return the norm before.

        As ``torch.nn.utils.clip_grad_norm_`` does in one process: by ``max_norm / (norm + 1e-6)`` where that is below 1.
        Every rank calls it.
        """
        norm = self.norm()
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for known in self.parameters:
            if (parameter := known()) is not None and parameter.grad is not None:
                _local(parameter.grad).mul_(scale.to(parameter.grad.dtype))
        return norm

    def norm(self) -> Tensor:
        """Return the norm of the whole model's gradient; every rank calls it."""
        total = self._squares(of_experts=False)
        if self.experts is not None:
            of_experts = self._squares(of_experts=True)
            dist.all_reduce(of_experts, group=self.experts)
            total += of_experts
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total.sqrt()

    def _squares(self, *, of_experts: bool) -> Tensor:
        """Return the sum of the squares that count on this rank: of split experts, or of all other parameters."""
        squares = [
            norm_of(gradient).float().square()
            for known, share in self.shares
            if share.is_expert == of_experts and (parameter := known()) is not None and parameter.grad is not None
            for gradient in _parts(_local(parameter.grad), share)
        ]
        return torch.stack(squares).sum() if squares else torch.zeros((), device=self.device)


def norm_of(tensor: Tensor) -> Tensor:
    """Return the norm of a tensor's entries, in float32 or wider."""
    dense = tensor.coalesce().values() if tensor.is_sparse else tensor
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return torch.linalg.vector_norm(real, dtype=torch.promote_types(real.dtype, torch.float32))


def _local(gradient: Any) -> Tensor:
    """Return what this rank has of a gradient, which a DTensor may hold."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _parts(gradient: Tensor, share: NormShare) -> list[Tensor]:
    if share.parts is None:
        return [gradient]
    return [gradient.narrow(share.axis, start, stop - start) for start, stop in share.parts]
