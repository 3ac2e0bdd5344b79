"""Hooks that carry out layout steps while a module is called: each is named after its step. ``apply.py`` registers them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, frozen
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from ..model.rng_state import FORKS, RngState, derive_seed
from .collectives import average_gradient, gather_parts, gather_sum, own_ids, reduce_scatter, sum_gradient

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ...specs.layout_steps import DispatchTokens, LayoutStep, SumGradient
    from .collectives import SyncGroup

    Around = Callable[[LayoutStep], AbstractContextManager[Any]]


def group_name(mesh_axis: str, num_sharing: int) -> str:
    """Return the name of a rank's group of neighbours along a mesh axis, which share a tensor.

    >>> group_name("tensor", 2)
    'tensor/2'
    """
    return f"{mesh_axis}/{num_sharing}"


@frozen
class SyncHook:
    """Send a floating-point input or output of a module through a collective operator.

    Args:
        function: The operator.
        group: The ranks.
        which: Number of the input or output among the floating-point tensors, from 0.
    """

    function: Callable[[Tensor, SyncGroup], Tensor]
    group: SyncGroup
    which: int = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Send an argument through the operator."""
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
        """Send an output through the operator."""
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

    def _meant(self, side: str) -> str:
        return f"its floating-point {side} {self.which}" if self.which else f"its {side}"


@define
class SumGradientHook:
    """Sum the gradient of a module's tensor over ranks: the module computes with the result of an operator on it.

    Args:
        name: The tensor's name.
        sums: How its gradient is summed, each with this rank's groups by name, and with what is entered meanwhile; several
            sums follow each other.
    """

    name: str
    sums: list[tuple[SumGradient, Mapping[str, SyncGroup], Around]] = Factory(list)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the operator's result under the tensor's name."""
        tensor = module._parameters[self.name]  # noqa: SLF001  getattr may find the result of an outer call
        if tensor is not None:
            for step, groups, around in self.sums:
                with around(step):
                    tensor = _with_summed_gradient(tensor, step, groups)
            module.__dict__[self.name] = tensor

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Put the tensor back, also after an error."""
        module.__dict__.pop(self.name, None)


def _with_summed_gradient(tensor: Tensor, step: SumGradient, groups: Mapping[str, SyncGroup]) -> Tensor:
    if not step.sharing:
        return _summed(tensor, groups[step.mesh_axis], step.divide)
    if len(step.sharing) == 1:
        return _summed(tensor, groups[group_name(step.mesh_axis, step.sharing[0][1])], step.divide)
    parts = tensor.split([size for size, _ in step.sharing], dim=step.axis)
    named = [(part, num, group_name(step.mesh_axis, num)) for part, (_, num) in zip(parts, step.sharing, strict=True)]
    passed = [_summed(part, groups[name], step.divide) if num > 1 else part for part, num, name in named]
    return torch.cat(passed, dim=step.axis)


def _summed(tensor: Tensor, group: SyncGroup, divide: int) -> Tensor:
    return average_gradient(tensor, divide, group.name) if divide > 1 else sum_gradient(tensor, group.name)


@frozen
class DispatchTokensHook:
    """Let the experts of each rank compute with the tokens of all ranks along ``expert``.

    All ranks have the same number of tokens. Each rank gathers the tokens of all, as its experts may be chosen for any; the
    outputs of the experts are summed, and each rank keeps the sums for its tokens (as Megatron-LM's all-gather dispatcher).

    Args:
        step: The experts module, and the number of experts of a rank.
        group: The ranks along ``expert``.
    """

    step: DispatchTokens
    group: SyncGroup

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Gather tokens, chosen experts and their weights; choices of experts on other ranks get weight 0."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        floating, chosen = [t for t in tensors if _is_activation(t)], [t for t in tensors if not t.is_floating_point()]
        if len(floating) != 2 or len(chosen) != 1:  # noqa: PLR2004  tokens and weights
            msg = (
                f"{type(module).__name__} is no experts module: it is to be called with tokens, chosen experts, and weights"
            )
            raise TypeError(msg)
        (tokens, weights), num, index, name = floating, self.group.num_ranks, self.group.index, self.group.name
        ids = own_ids(gather_parts(chosen[0], 0, self.group, None), self.step.num_experts, index, name)
        is_mine = (ids >= 0) & (ids < self.step.num_experts)
        elsewhere = self.step.num_experts if _skips_one_more(module) else 0  # expert 0 is computed with weight 0
        given = {
            id(tokens): gather_sum(tokens, 0, num, index, name),
            id(chosen[0]): torch.where(is_mine, ids, elsewhere),
            id(weights): gather_sum(weights, 0, num, index, name).masked_fill(~is_mine, 0),
        }
        return tuple(given.get(id(a), a) for a in args), {key: given.get(id(a), a) for key, a in kwargs.items()}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Sum the outputs of all experts for each token, and keep the sums of this rank's tokens."""
        if not _is_activation(output):
            msg = f"{type(module).__name__} returned a {type(output).__name__}, and experts give a tensor"
            raise TypeError(msg)
        if torch.is_grad_enabled() and not output.requires_grad:
            # no token has come to this rank's experts, and all other ranks wait for its part of the backward pass
            own = [getattr(module, name) for name in module._parameters]  # noqa: SLF001
            output = _ZeroGradients.apply(output, *filter(_is_activation, (*args, *kwargs.values(), *own)))
        return reduce_scatter(output, 0, self.group.num_ranks, self.group.index, self.group.name)


def _skips_one_more(module: nn.Module) -> bool:
    """Tell whether an experts module skips the number past its last expert, as transformers' experts do, except a few."""
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation in (None, "eager"):  # its own code runs
        return hasattr(module, "_is_expert_parallel") and _counts_one_more(type(module))
    return hasattr(module, "_is_expert_parallel")


@cache
def _counts_one_more(cls: type[nn.Module]) -> bool:
    try:
        return re.search(r"num_experts\s*\+\s*1\b", inspect.getsource(inspect.unwrap(cls.forward))) is not None
    except (OSError, TypeError):  # its source was written at run time
        return False


class _ZeroGradients(torch.autograd.Function):
    """Connect an output to inputs that it does not depend on: they get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0], *map(torch.zeros_like, ctx.saved_tensors))


@frozen
class MaskPaddingHook:
    """Set the output features that are padding to the lowest number of their dtype.

    Args:
        part: Output features of each rank.
        size: Output features of all ranks together, without padding.
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


def random_numbers_differ() -> bool:
    """Tell whether random numbers that are drawn now, on fake tensors, differ along ``tensor``."""
    return FORKS.differ


@frozen
class ForkRngHook:
    """Give a module random numbers that differ along ``tensor``, and restore torch's generators after it.

    The seed follows from a number that the CPU's generator draws at each call, the same on all ranks, and from the rank's
    place along ``tensor``. A checkpointed region that is computed again therefore draws the same numbers again.

    Args:
        index: Place of the rank along ``tensor``.
        running: For each call that is running, how many calls around it have random numbers of their own.
    """

    index: int
    running: list[int] = Factory(list)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the states of the generators, and seed them."""
        if detect_fake_mode() is not None:  # no number is drawn
            self._open()
            FORKS.differ = True
            return
        common = int(torch.randint(2**62, ()))
        self._open()
        torch.manual_seed(derive_seed(common, f"tensor {self.index}"))

    def _open(self) -> None:
        self.running.append(len(FORKS.outside))
        FORKS.outside.append(_rng_state())

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Restore the generators, also after an error."""
        if not self.running:
            return
        around = self.running.pop()
        if (outside := FORKS.outside[around]) is not None:
            _restore_rng(outside)
        del FORKS.outside[around:]


@frozen
class ShareRngHook:
    """Give a module the random numbers that all ranks draw, also within a module that has random numbers of its own.

    Args:
        onwards: Whether they go on after it, until the module around it ends that has random numbers of its own.
        inside: For each call that is running, the state of the generators around it; None if they are the common ones.
    """

    onwards: bool = False
    inside: list[RngState | None] = Factory(list)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Go on with the common random numbers."""
        common = next((state for state in FORKS.outside if state is not None), None)
        self.inside.append(_rng_state() if common is not None and not self.onwards else None)
        if common is not None:
            _restore_rng(common)
        if self.onwards:
            FORKS.outside[:] = [None] * len(FORKS.outside)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Go back to the random numbers around it, also after an error."""
        if not self.inside:
            return
        around = self.inside.pop()
        if around is not None:
            at = next(at for at, state in enumerate(FORKS.outside) if state is not None)
            FORKS.outside[at] = _rng_state()
            _restore_rng(around)


def _rng_state() -> RngState:
    if detect_fake_mode() is not None:
        return FORKS.differ
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


def _restore_rng(state: RngState) -> None:
    if isinstance(state, bool):
        FORKS.differ = state
        return
    cpu, gpu = state
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors(num: int) -> str:
    return f"{num} floating-point tensor{'s' if num > 1 else ''}" if num else "no floating-point tensor"
