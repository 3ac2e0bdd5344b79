"""Apply layout steps to the modules of a copy: on fake tensors while planning, and on a rank's own tensors."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any, assert_never, get_args

import torch
from attrs import frozen
from torch import Tensor, nn

from ...specs.layout_steps import (
    AddBiasAfterSync,
    DispatchTokens,
    ForkRng,
    LayoutStep,
    MaskPadding,
    SetAttributes,
    SetToLocalSize,
    ShareRng,
    SumGradient,
    SumProducts,
    Sync,
    SyncOp,
    VocabParallel,
)
from ..model.callables import find_callable
from ..model.linear import forward_without_bias, linear_of
from ..model.read import first_argument
from .collectives import SyncGroup, own_ids, sync_function
from .hooks import DispatchTokensHook, ForkRngHook, MaskPaddingHook, ShareRngHook, SumGradientHook, SyncHook
from .products import sum_products

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate


@frozen
class RankContext:
    """The rank for which layout steps are applied.

    Args:
        coordinate: Its place in the mesh.
        groups: Its synchronisation group along each mesh axis, and its groups of neighbours, by name.
        callables: The user's functions by name.
        around: Returns a context manager that is entered while the code of a step runs in a forward pass.
    """

    coordinate: Coordinate
    groups: Mapping[str, SyncGroup]
    callables: Mapping[str, Any]
    around: Callable[[LayoutStep], AbstractContextManager[Any]] = nullcontext

    def within(self, step: LayoutStep, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return a hook that runs as the code of a step."""
        if self.around is nullcontext:
            return hook

        @functools.wraps(hook)
        def running(*args: Any, **kwargs: Any) -> Any:
            with self.around(step):
                return hook(*args, **kwargs)

        return running


def apply_layout(model: nn.Module, step: LayoutStep, rank: RankContext) -> None:  # noqa: C901, PLR0912  one case a step
    """Apply a layout step to its module."""
    module = model.get_submodule(step.module)
    match step:
        case SetAttributes(values=values):
            for name, value in values.items():
                _set(module, name, value)
        case SetToLocalSize(attribute=attribute, tensor=tensor, axis=axis):
            setattr(module, attribute, getattr(module, tensor).shape[axis])
        case VocabParallel():
            assert isinstance(module, nn.Embedding), "the schedule checks it"
            _look_up_own_rows(module, step, rank)
        case AddBiasAfterSync():
            assert linear_of(module), "the plan checks it"
            module.forward = MethodType(forward_without_bias, module)
            _hook_after(module, rank.within(step, _add_bias))
        case Sync(when=when, op=op, mesh_axis=mesh_axis, which=which):
            function = sync_function(step) if op in get_args(SyncOp) else find_callable(op, rank.callables)
            hook = SyncHook(function, rank.groups[mesh_axis], which)
            if when in ("forward_post", "backward_pre"):
                _hook_after(module, rank.within(step, hook.after))
            else:
                _hook_before(module, rank.within(step, hook.before))
        case SumGradient():
            _sum_gradient(module, step, rank)
        case SumProducts():
            sum_products(model, step, rank.groups[step.mesh_axis].name, rank.around)
        case DispatchTokens():
            dispatch = DispatchTokensHook(step, rank.groups[step.mesh_axis])
            if hasattr(module, "_is_expert_parallel"):  # transformers' mark of a module with part of the experts
                setattr(module, "_is_expert_parallel", True)  # noqa: B010
            _hook_before(module, rank.within(step, dispatch.before))
            module.register_forward_hook(rank.within(step, dispatch.after), with_kwargs=True)
            _move_user_hooks_last(module._forward_hooks)  # noqa: SLF001
        case ForkRng():
            forked = ForkRngHook(rank.coordinate.index(step.mesh_axis))
            _hook_before(module, forked.before)
            _hook_after(module, forked.after, also_after_errors=True)
        case ShareRng(onwards=onwards):
            shared = ShareRngHook(onwards)
            _hook_before(module, shared.before)
            _hook_after(module, shared.after, also_after_errors=True)
        case MaskPadding(sizes=(part, size)):
            mask = MaskPaddingHook(part, size, rank.groups[step.mesh_axis])
            _hook_after(module, rank.within(step, mask.after))
        case _:
            assert_never(step)


def _sum_gradient(module: nn.Module, step: SumGradient, rank: RankContext) -> None:
    """Sum the gradient of a tensor, after the sums that it has already."""
    hooks = map(_owner, module._forward_pre_hooks.values())  # noqa: SLF001
    summing = next((hook for hook in hooks if isinstance(hook, SumGradientHook) and hook.name == step.name), None)
    if summing is None:
        summing = SumGradientHook(step.name)
        _hook_before(module, summing.before)
        _hook_after(module, summing.after, also_after_errors=True)
    summing.sums.append((step, rank.groups, rank.around))


_LAYOUT_HOOKS = (SyncHook, SumGradientHook, DispatchTokensHook, MaskPaddingHook, ForkRngHook, ShareRngHook)


def _move_user_hooks_last(hooks: dict[int, Any]) -> None:
    """Move the user's hooks behind the layout's hooks, so that they see the tensors of the unsplit module."""
    for key, hook in list(hooks.items()):
        if inspect.unwrap(hook) is not _add_bias and not isinstance(_owner(hook), _LAYOUT_HOOKS):
            hooks[key] = hooks.pop(key)


def _owner(hook: Callable[..., Any]) -> Any:
    """Return the object whose method a hook is, None for a function."""
    return getattr(inspect.unwrap(hook), "__self__", None)


def _hook_before(module: nn.Module, hook: Callable[..., Any]) -> None:
    module.register_forward_pre_hook(hook, with_kwargs=True)
    _move_user_hooks_last(module._forward_pre_hooks)  # noqa: SLF001


def _hook_after(module: nn.Module, hook: Callable[..., Any], *, also_after_errors: bool = False) -> None:
    module.register_forward_hook(hook, always_call=also_after_errors)
    _move_user_hooks_last(module._forward_hooks)  # noqa: SLF001


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute; for a dotted name, of a copy of the module's object, as the object may be shared."""
    outer, dot, rest = name.partition(".")
    if dot:
        owned = copy.copy(getattr(module, outer))
        setattr(module, outer, owned)
        setattr(owned, rest, value)
    else:
        setattr(module, name, value)


def _add_bias(module: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
    """Add the bias of a row-split linear module after the sum of its outputs."""
    return output + module.bias


def _look_up_own_rows(module: nn.Embedding, step: VocabParallel, rank: RankContext) -> None:
    """Make an embedding look up the rows that this rank has, and return zeros for all further rows.

    The rank's place is an argument of an operator, so that all ranks have the same graph.
    """
    num_rows, padding = module.weight.shape[0], module.padding_idx
    module.padding_idx = None
    whole_forward = type(module).forward
    part, index, group = step.num_rows, rank.coordinate.index(step.mesh_axis), rank.groups[step.mesh_axis].name

    name = first_argument(module)

    def forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Tensor:
        ids = args[0] if args else kwargs[name]
        if num_rows == 0:  # uneven splits may leave a rank without rows
            with rank.around(step):
                return self.weight.sum() + self.weight.new_zeros(*ids.shape, self.weight.shape[1])
        with rank.around(step):
            own = own_ids(ids, part, index, group)
            is_mine = (own >= 0) & (own < num_rows)
            mine = torch.where(is_mine, own, 0)
        rows = whole_forward(self, mine, *args[1:], **kwargs) if args else whole_forward(self, **{**kwargs, name: mine})
        with rank.around(step):
            if padding is not None:  # the row of the padding token is not trained
                rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
            return rows.masked_fill(~is_mine.unsqueeze(-1), 0)

    module.forward = MethodType(forward, module)
