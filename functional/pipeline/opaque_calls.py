"""Calls that an export does not follow: a single node of the graph stands for a leaf module, or for a user's function.

The node is a placeholder that never runs. ``stage_module.py`` puts the call itself in its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import base_types
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..model.fake_values import AnswerZero

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ...specs.mesh import MeshAxis
    from ..layout.collectives import SyncGroup

_RESULTS: dict[int, Sequence[Tensor]] = {}
"""Results of the placeholder that is being traced, by its number."""


@frozen
class LeafCall:
    """A call of a module that was marked as a leaf."""

    path: str

    def __str__(self) -> str:
        return f"leaf {self.path}"


@frozen
class FunctionCall:
    """A call of a user's function that synchronises along a mesh axis."""

    name: str
    mesh_axis: MeshAxis

    def __str__(self) -> str:
        return f"{self.name} over {self.mesh_axis}"


@frozen
class TensorSlot:
    """Stands for a tensor, by number, in the arguments of a call."""

    number: int


@frozen
class OpaqueCall:
    """A call that is not followed.

    Args:
        callee: The leaf or the function that is called.
        args: Its positional arguments, with slots for tensors.
        kwargs: Its named arguments.
        kept: Places of the tensors among the leaves of its return value.
    """

    callee: LeafCall | FunctionCall
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kept: tuple[int, ...]

    def fill(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return its arguments with values in the slots."""
        return tree_map_only(TensorSlot, lambda slot: values[slot.number], (self.args, dict(self.kwargs)))


class NotCallableError(TypeError):
    """A leaf has an argument that a graph cannot hold."""


@torch.library.custom_op("shardplan::opaque", mutates_args=())
def opaque(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    """Stand for a call that is not followed; the placeholder never runs."""
    msg = "a placeholder of an export was run"
    raise AssertionError(msg)


@opaque.register_fake
def _(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    return stand_ins(_RESULTS[number])


def stand_ins(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return new tensors with the sizes and strides of the given tensors, as an operator must not return their memory."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]


@define
class OpaqueCalls:
    """The calls that an export does not follow.

    Args:
        calls: The calls, by number.
    """

    calls: list[OpaqueCall] = Factory(list)

    def function(self, name: str, function: Callable[[Tensor, SyncGroup], Tensor]) -> Callable[[Tensor, SyncGroup], Tensor]:
        """Return a user's synchronisation as a call that is not followed; the group's name is its mesh axis."""

        def call(x: Tensor, group: SyncGroup) -> Tensor:
            callee = FunctionCall(name, group.name)  # type: ignore[arg-type]  while exporting it is a mesh axis
            return self._stand_for(callee, lambda y: function(y, evolve(group, name="")), (x,), {})

        return call

    def hide(self, path: str, module: nn.Module) -> None:
        """Make a module of the exported copy a leaf, its hooks included."""
        forward, hooks = module.forward, (module._forward_pre_hooks, module._forward_hooks)  # noqa: SLF001

        def run(*args: Any, **kwargs: Any) -> Any:
            with _replaced(module, forward, *hooks):
                return module(*args, **kwargs)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return self._stand_for(LeafCall(path), run, args, kwargs)

        _replace(module, stand_in, OrderedDict(), OrderedDict())

    def _stand_for(
        self, callee: LeafCall | FunctionCall, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call, and return its return value with the tensors of a placeholder."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = iter(range(len(tensors)))
        template: Any = tree_map_only(Tensor, lambda _: TensorSlot(next(numbers)), (args, kwargs))
        for leaf in tree_leaves(template):
            if leaf is not None and not isinstance(leaf, (TensorSlot, *base_types)):
                msg = f"it is called with a {type(leaf).__name__}"
                raise NotCallableError(msg)
        with _disable_current_modes(), _mode_of(tensors), AnswerZero():
            returned, structure = tree_flatten(run(*args, **kwargs))
        kept = tuple(place for place, leaf in enumerate(returned) if isinstance(leaf, Tensor))
        number = len(self.calls)
        self.calls.append(OpaqueCall(callee, template[0], template[1], kept))
        _RESULTS[number] = [returned[place] for place in kept]
        try:
            outputs = opaque(tensors, number)
        finally:
            del _RESULTS[number]
        for place, tensor in zip(kept, outputs, strict=True):
            returned[place] = tensor
        return tree_unflatten(returned, structure)


def is_opaque(node: fx.Node) -> bool:
    """Tell whether a node of a graph is the placeholder of a call."""
    return node.target is opaque._opoverload  # noqa: SLF001  the operator behind the function


def tensors_of(returned: Any, kept: tuple[int, ...]) -> list[Tensor]:
    """Return the tensors at given places among the leaves of a return value."""
    leaves = tree_leaves(returned)
    return [leaves[place] for place in kept]


def _mode_of(tensors: Sequence[Tensor]) -> FakeTensorMode:
    """Return the fake mode of the activations, whose symbolic sizes are the export's; the parameters have another mode."""
    return next(tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor))


def _replace(module: nn.Module, forward: Any, pre_hooks: Any, hooks: Any) -> None:
    module.forward = forward
    module._forward_pre_hooks, module._forward_hooks = pre_hooks, hooks  # noqa: SLF001


@contextmanager
def _replaced(module: nn.Module, forward: Any, pre_hooks: Any, hooks: Any) -> Iterator[None]:
    before = (module.forward, module._forward_pre_hooks, module._forward_hooks)  # noqa: SLF001
    _replace(module, forward, pre_hooks, hooks)
    try:
        yield
    finally:
        _replace(module, *before)
