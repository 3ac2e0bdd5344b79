"""Changes of how modules compute, applied to a copy: the same code while planning, on fake tensors, and for real."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
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
    SumGradient,
    Sync,
    SyncOp,
    VocabParallel,
)
from ..model.callables import find_callable
from ..model.linear import forward_without_bias, linear_of
from .collectives import SyncGroup, own_ids, sync_function
from .hooks import Dispatch, Mask, PassWeight, Synchronise
from .rng_hooks import OwnRng

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate


@frozen
class Local:
    """What one rank needs to know to change its module.

    Args:
        coordinate: Where it stands.
        groups: Its synchronisation group along each mesh axis, and its groups of neighbours, by name.
        callables: The user's functions by name.
    """

    coordinate: Coordinate
    groups: Mapping[str, SyncGroup]
    callables: Mapping[str, Any]


def apply_layout(model: nn.Module, step: LayoutStep, local: Local) -> None:  # noqa: C901, PLR0912  one case a change
    """Change one module of a copy as a step says."""
    module = model.get_submodule(step.module)
    match step:
        case SetAttributes(values=values):
            for name, value in values.items():
                _set(module, name, value)
        case SetToLocalSize(attribute=attribute, tensor=tensor, axis=axis):
            setattr(module, attribute, getattr(module, tensor).shape[axis])
        case VocabParallel():
            assert isinstance(module, nn.Embedding), "the schedule checks it"
            _own_rows(module, step, local)
        case AddBiasAfterSync():
            assert linear_of(module), "the plan checks it"
            module.forward = MethodType(forward_without_bias, module)
            _hook_after(module, _add_bias)
        case Sync(when=when, op=op, mesh_axis=mesh_axis, which=which):
            function = sync_function(step) if op in get_args(SyncOp) else find_callable(op, local.callables)
            hook = Synchronise(function, local.groups[mesh_axis], which)
            if when in ("forward_post", "backward_pre"):
                _hook_after(module, hook.after)
            else:
                _hook_before(module, hook.before)
        case SumGradient():
            passing = PassWeight(step, local.groups)
            _hook_before(module, passing.before)
            _hook_after(module, passing.after, also_after_errors=True)
        case DispatchTokens():
            dispatch = Dispatch(step, local.groups[step.mesh_axis])
            if hasattr(module, "_is_expert_parallel"):  # transformers' word for experts of which others have some
                setattr(module, "_is_expert_parallel", True)  # noqa: B010
            _hook_before(module, dispatch.before)
            module.register_forward_hook(dispatch.after, with_kwargs=True)
            _before_those_of_the_user(module._forward_hooks)  # noqa: SLF001
        case ForkRng():
            forked = OwnRng(local.coordinate.index(step.mesh_axis))
            _hook_before(module, forked.before)
            _hook_after(module, forked.after, also_after_errors=True)
        case MaskPadding(sizes=(part, size)):
            _hook_after(module, Mask(part, size, local.groups[step.mesh_axis]).after)
        case _:
            assert_never(step)


_OURS = (Synchronise, PassWeight, Dispatch, Mask, OwnRng)


def _before_those_of_the_user(hooks: dict[int, Any]) -> None:
    """Let the user's hooks see what the unsplit module would show them: they come after ours."""
    for key, hook in list(hooks.items()):
        if hook is not _add_bias and not isinstance(getattr(hook, "__self__", None), _OURS):
            hooks[key] = hooks.pop(key)


def _hook_before(module: nn.Module, hook: Callable[..., Any]) -> None:
    module.register_forward_pre_hook(hook, with_kwargs=True)
    _before_those_of_the_user(module._forward_pre_hooks)  # noqa: SLF001


def _hook_after(module: nn.Module, hook: Callable[..., Any], *, also_after_errors: bool = False) -> None:
    module.register_forward_hook(hook, always_call=also_after_errors)
    _before_those_of_the_user(module._forward_hooks)  # noqa: SLF001


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute; one of an object that the module keeps is set on a copy of it, which is the module's own."""
    kept, dot, rest = name.partition(".")
    if dot:
        owned = copy.copy(getattr(module, kept))
        setattr(module, kept, owned)
        setattr(owned, rest, value)
    else:
        setattr(module, name, value)


def _add_bias(module: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module.bias


def _own_rows(module: nn.Embedding, step: VocabParallel, local: Local) -> None:
    """Make an embedding look up the rows that it has, and give zeros for all others.

    What differs from rank to rank is an argument of one operator, so that all ranks have the same graph.
    """
    num_rows, padding = module.weight.shape[0], module.padding_idx
    module.padding_idx = None
    whole_forward = type(module).forward
    part, index, group = step.num_rows, local.coordinate.index(step.mesh_axis), local.groups[step.mesh_axis].name

    name = first_argument(module)

    def forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Tensor:
        ids = args[0] if args else kwargs[name]
        if num_rows == 0:  # as an uneven split may leave it, if that is allowed
            return self.weight.sum() + self.weight.new_zeros(*ids.shape, self.weight.shape[1])
        own = own_ids(ids, part, index, group)
        is_mine = (own >= 0) & (own < num_rows)
        mine = torch.where(is_mine, own, 0)
        rows = whole_forward(self, mine, *args[1:], **kwargs) if args else whole_forward(self, **{**kwargs, name: mine})
        if padding is not None:  # whose row is not trained
            rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
        return rows.masked_fill(~is_mine.unsqueeze(-1), 0)

    module.forward = MethodType(forward, module)


def first_argument(module: nn.Module) -> str:
    """Return the name of the first argument of a module's forward.

    >>> first_argument(nn.Embedding(2, 2))
    'input'
    """
    return next(iter(inspect.signature(module.forward).parameters), "")
