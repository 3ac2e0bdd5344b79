"""Hooks of a module that communicate: activations and weights on their way through an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, nn

from .collectives import average_gradient, gather_sum, joined, own_ids, reduce_scatter, sum_gradient

if TYPE_CHECKING:
    from ...specs.layout_steps import DispatchTokens, SumGradient
    from .collectives import SyncGroup


def group_name(mesh_axis: str, num_sharing: int) -> str:
    """Return the name under which a rank finds its group of neighbours along a mesh axis.

    >>> group_name("tensor", 2)
    'tensor/2'
    """
    return f"{mesh_axis}/{num_sharing}"


@frozen
class Synchronise:
    """Sends one of a module's floating-point inputs or outputs through an operator.

    Args:
        function: The operator.
        group: The ranks.
        which: Which of the tensors, from 0.
    """

    function: Callable[[Tensor, SyncGroup], Tensor]
    group: SyncGroup
    which: int = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Change an argument."""
        found = [place for place, value in enumerate(args) if _is_activation(value)]
        if self.which < len(found):
            place = found[self.which]
            return (*args[:place], self.function(args[place], self.group), *args[place + 1 :]), kwargs
        named = [name for name, value in kwargs.items() if _is_activation(value)]
        if self.which - len(found) < len(named):
            name = named[self.which - len(found)]
            return args, {**kwargs, name: self.function(kwargs[name], self.group)}
        num = len(found) + len(named)
        msg = f"{type(module).__name__} was called with {_tensors(num)}, and {self._meant('input')} is to be synchronised"
        raise TypeError(msg)

    def after(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        """Change an output."""
        if _is_activation(output) and self.which == 0:
            return self.function(output, self.group)
        if isinstance(output, dict):  # transformers' outputs are dictionaries too
            names = [name for name, value in output.items() if _is_activation(value)]
            if self.which < len(names):
                name = names[self.which]
                output[name] = self.function(output[name], self.group)
                return output
        if isinstance(output, (tuple, list)):
            places = [place for place, value in enumerate(output) if _is_activation(value)]
            if self.which < len(places):
                place = places[self.which]
                parts = (*output[:place], self.function(output[place], self.group), *output[place + 1 :])
                return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        msg = f"{type(module).__name__} returned no such tensor, and {self._meant('output')} is to be synchronised"
        raise TypeError(msg)

    def _meant(self, what: str) -> str:
        return f"its floating-point {what} {self.which}" if self.which else f"its {what}"


@frozen
class PassWeight:
    """Lets a module compute with what an operator gives of one of its tensors; the tensor itself stays where it is.

    Args:
        step: Which tensor, and how its gradient is summed.
        groups: This rank's groups by name.
    """

    step: SumGradient
    groups: Mapping[str, SyncGroup]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the module find the operator's result under the tensor's name."""
        tensor = module._parameters[self.step.name]  # noqa: SLF001  getattr may find the result of a call that goes on
        if tensor is not None:
            module.__dict__[self.step.name] = self._passed(tensor)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let the module find the tensor again, also after an error."""
        module.__dict__.pop(self.step.name, None)

    def _passed(self, tensor: Tensor) -> Tensor:
        step = self.step
        if not step.sharing:
            return self._summed(tensor, self.groups[step.mesh_axis])
        if len(step.sharing) == 1:
            return self._summed(tensor, self.groups[group_name(step.mesh_axis, step.sharing[0][1])])
        parts = tensor.split([size for size, _ in step.sharing], dim=step.axis)
        named = [(part, num, group_name(step.mesh_axis, num)) for part, (_, num) in zip(parts, step.sharing, strict=True)]
        passed = [self._summed(part, self.groups[name]) if num > 1 else part for part, num, name in named]
        return torch.cat(passed, dim=step.axis)

    def _summed(self, tensor: Tensor, group: SyncGroup) -> Tensor:
        if self.step.divide > 1:
            return average_gradient(tensor, self.step.divide, group.name)
        return sum_gradient(tensor, group.name)


@frozen
class Dispatch:
    """Lets experts compute with the tokens of all ranks along ``expert``, each for its own.

    All of them have the same number of tokens. Every rank gets the tokens of all, as its experts may be chosen for any; what
    they give is summed, and each rank keeps its own tokens' (Megatron-LM's all-gather dispatcher does the same).

    Args:
        step: Which experts.
        group: The ranks along ``expert``.
    """

    step: DispatchTokens
    group: SyncGroup

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Gather tokens, chosen experts and their weights; what is chosen elsewhere weighs nothing."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        floating, chosen = [t for t in tensors if _is_activation(t)], [t for t in tensors if not t.is_floating_point()]
        if len(floating) != 2 or len(chosen) != 1:  # noqa: PLR2004  tokens and weights
            msg = (
                f"{type(module).__name__} is no experts module: it is to be called with tokens, chosen experts, and weights"
            )
            raise TypeError(msg)
        (tokens, weights), num, index, name = floating, self.group.num_ranks, self.group.index, self.group.name
        ids = own_ids(joined(chosen[0], 0, self.group, None), self.step.num_experts, index, name)
        is_mine = (ids >= 0) & (ids < self.step.num_experts)
        # transformers' experts pass over the number past the last one, others compute it and weigh it with zero
        elsewhere = self.step.num_experts if hasattr(module, "_is_expert_parallel") else 0
        given = {
            id(tokens): gather_sum(tokens, 0, num, index, name),
            id(chosen[0]): torch.where(is_mine, ids, elsewhere),
            id(weights): gather_sum(weights, 0, num, index, name).masked_fill(~is_mine, 0),
        }
        return tuple(given.get(id(a), a) for a in args), {key: given.get(id(a), a) for key, a in kwargs.items()}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Sum what all experts give for each token, and keep the own tokens'."""
        if not _is_activation(output):
            msg = f"{type(module).__name__} returned a {type(output).__name__}, and experts give a tensor"
            raise TypeError(msg)
        if torch.is_grad_enabled() and not output.requires_grad:
            # no token has come to this rank's experts, and the others wait for its part of the backward pass
            own = [getattr(module, name) for name in module._parameters]  # noqa: SLF001
            output = _Behind.apply(output, *filter(_is_activation, (*args, *kwargs.values(), *own)))
        return reduce_scatter(output, 0, self.group.num_ranks, self.group.index, self.group.name)


class _Behind(torch.autograd.Function):
    """An output that no input has gone into, with the inputs behind it all the same: their gradients are zeros."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0], *map(torch.zeros_like, ctx.saved_tensors))


@frozen
class Mask:
    """Gives the outputs that stand for padding the lowest number of their dtype.

    Args:
        part: Output features of each rank.
        size: Output features of all, without padding.
        group: The ranks.
    """

    part: int
    size: int
    group: SyncGroup

    def after(self, module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        """Mask the last axis."""
        places = torch.arange(self.part, device=output.device)
        end = own_ids(torch.full_like(places, self.size), self.part, self.group.index, self.group.name)
        return output.masked_fill(places >= end, torch.finfo(output.dtype).min)


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors(num: int) -> str:
    return f"{num} floating-point tensor{'s' if num > 1 else ''}" if num else "no floating-point tensor"
