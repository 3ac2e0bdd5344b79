"""Whether ranks along ``tensor`` have the same gradients and values of whole parameters when an optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from attrs import define
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..dialects.gradient_norm import norm_of
from .error import TrainingError

_TOLERANCE = 1e-3
"""Relative difference of norms: ranks compute the same, but perhaps add up in another order."""

_TOLD = 3


@define(eq=False)
class StepCheck:
    """Compares norms before the first steps of any optimizer over a module's parameters.

    Args:
        whole: The parameters that ranks along ``tensor`` hold whole, by path; they are not kept alive.
        group: The group along ``tensor``.
        device: Where its messages are.
        num_left: Steps that are still to be checked.
    """

    whole: Mapping[str, weakref.ref[nn.Parameter]]
    group: dist.ProcessGroup
    device: torch.device
    num_left: int

    def before_step(self, optimizer: Optimizer) -> None:
        """Compare the gradients and values of the parameters that an optimizer trains: an ``all_reduce`` for each.

        Raises:
            TrainingError: On each rank along ``tensor``, if they differ.
        """
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        known = ((path, parameter()) for path, parameter in self.whole.items())
        found = {path: p for path, p in known if p is not None and id(p) in trained}
        if not found or self.num_left <= 0:
            return
        self.num_left -= 1
        self._compare("gradients", {path: parameter.grad for path, parameter in found.items()})
        self._compare("parameters", dict(found))

    def _compare(self, what: str, tensors: Mapping[str, Tensor | None]) -> None:
        norms = torch.stack([_norm(tensor, self.device) for tensor in tensors.values()])
        both = torch.cat([norms, -norms])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        most, least = both[: len(norms)], -both[len(norms) :]
        wrong = ((most - least) > _TOLERANCE * most.abs().clamp(min=torch.finfo(most.dtype).tiny)).tolist()
        different = [path for path, is_wrong in zip(tensors, wrong, strict=True) if is_wrong]
        if different:
            raise TrainingError(_told(what, different, dist.get_process_group_ranks(self.group)))


def check_steps(check: StepCheck) -> None:
    """Let a check run before each step of any optimizer, for as long as something else holds it."""
    known = weakref.ref(check)

    def before(optimizer: Optimizer, _: Any, __: Any) -> None:
        if (found := known()) is not None:
            found.before_step(optimizer)

    handle = register_optimizer_step_pre_hook(before)
    weakref.finalize(check, handle.remove)


def _norm(tensor: Tensor | None, device: torch.device) -> Tensor:
    """Return the norm of what this rank has of a tensor; -1 where there is none."""
    if tensor is None:
        return torch.tensor(-1.0, device=device)
    return norm_of(getattr(tensor, "_local_tensor", tensor).detach()).float().to(device)


def _told(what: str, paths: list[str], ranks: list[int]) -> str:
    some = f"{', '.join(paths[:_TOLD])}{f' and {len(paths) - _TOLD} more' if len(paths) > _TOLD else ''}"
    if what == "gradients":
        cause = (
            "torch.nn.utils.clip_grad_norm_ takes each rank's own norm: use built.clip_grad_norm_(max_norm). If nothing is "
            "clipped, ranks were given different batches, or lose different gradients"
        )
    else:
        cause = "Something has changed them on one rank alone, or ranks have other optimizers or learning rates"
    return f"{what} that ranks {', '.join(map(str, ranks))} along tensor hold whole are not alike: {some}. {cause}"
