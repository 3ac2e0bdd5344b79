"""Changes of how modules compute, applied to a copy: the same code while planning, on fake tensors, and for real."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, assert_never, get_args

import torch
from attrs import frozen
from torch import Tensor, nn

from ..specs.steps import AddBiasAfterSync, LayoutStep, SetAttributes, Sync, SyncOp, VocabParallel
from .callables import find
from .sync import SyncGroup, own_ids, sync_function

if TYPE_CHECKING:
    from ..specs.mesh import Coordinate, MeshAxis


@frozen
class Local:
    """What one rank needs to know to change its module.

    Args:
        coordinate: Where it stands.
        groups: Its synchronisation group along each mesh axis.
        callables: The user's functions by name.
    """

    coordinate: Coordinate
    groups: Mapping[MeshAxis, SyncGroup]
    callables: Mapping[str, Any]


def apply_layout(model: nn.Module, step: LayoutStep, local: Local) -> None:
    """Change one module of a copy as a step says."""
    module = model.get_submodule(step.module)
    match step:
        case SetAttributes(values=values):
            for name, value in values.items():
                setattr(module, name, value)
        case VocabParallel():
            assert isinstance(module, nn.Embedding), "the schedule checks it"
            _own_rows(module, local)
        case AddBiasAfterSync():
            assert isinstance(module, nn.Linear), "the plan checks it"
            module.forward = MethodType(_without_bias, module)
            module.register_forward_hook(_add_bias)
            _before_those_of_the_user(module._forward_hooks)  # noqa: SLF001
        case Sync(when=when, op=op, axis=axis, mesh_axis=mesh_axis):
            function = sync_function(when, op, axis) if op in get_args(SyncOp) else find(op, local.callables)
            hook = _Synchronise(function, local.groups[mesh_axis])
            if when == "forward_post":
                module.register_forward_hook(hook.after)
                _before_those_of_the_user(module._forward_hooks)  # noqa: SLF001
            else:
                module.register_forward_pre_hook(hook.before, with_kwargs=True)
                _before_those_of_the_user(module._forward_pre_hooks)  # noqa: SLF001
        case _:
            assert_never(step)


@frozen
class _Synchronise:
    """A hook that sends a module's first floating-point input or output through an operator."""

    function: Callable[[Tensor, SyncGroup], Tensor]
    group: SyncGroup

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        for place, value in enumerate(args):
            if _is_activation(value):
                return (*args[:place], self.function(value, self.group), *args[place + 1 :]), kwargs
        for name, value in kwargs.items():
            if _is_activation(value):
                return args, {**kwargs, name: self.function(value, self.group)}
        msg = f"{type(module).__name__} was called without a floating-point tensor, and its input is to be synchronised"
        raise TypeError(msg)

    def after(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if _is_activation(output):
            return self.function(output, self.group)
        if isinstance(output, dict):  # transformers' outputs are dictionaries too
            for name, value in output.items():
                if _is_activation(value):
                    output[name] = self.function(value, self.group)
                    return output
        if isinstance(output, (tuple, list)):
            for place, value in enumerate(output):
                if _is_activation(value):
                    parts = (*output[:place], self.function(value, self.group), *output[place + 1 :])
                    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        msg = f"{type(module).__name__} returned no floating-point tensor, and its output is to be synchronised"
        raise TypeError(msg)


def _before_those_of_the_user(hooks: dict[int, Any]) -> None:
    """Let the user's hooks see what the unsplit module would show them: they come after ours."""
    for key, hook in list(hooks.items()):
        if hook is not _add_bias and not isinstance(getattr(hook, "__self__", None), _Synchronise):
            hooks[key] = hooks.pop(key)


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _without_bias(self: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's name for it
    return nn.functional.linear(input, self.weight)


def _add_bias(module: nn.Linear, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module.bias


def _own_rows(module: nn.Embedding, local: Local) -> None:
    """Make an embedding look up the rows that it has, and give zeros for all others.

    What differs from rank to rank is an argument of one operator, so that all ranks have the same graph.
    """
    num_rows, padding = module.weight.shape[0], module.padding_idx
    module.padding_idx = None
    whole_forward = type(module).forward
    index, group = local.coordinate.index("tensor"), local.groups["tensor"].name

    name = first_argument(module)

    def forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Tensor:
        ids = args[0] if args else kwargs[name]
        own = own_ids(ids, num_rows, index, group)
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
