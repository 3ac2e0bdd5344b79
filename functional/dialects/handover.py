"""What a dialect gets, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen
from frozendict import frozendict

from ...specs.mesh import MeshAxis
from ...specs.plan import Plan


@frozen
class Handover:
    """A filled module on its way to a runtime.

    Args:
        modules: This rank's torch modules: its stages, or the whole.
        plan: The plan that they were filled by.
        device: Where their tensors are.
        groups: This rank's process group along each set of mesh axes that the dialect asked for.
        tied: Trained tensors that other stages hold too: the parameter, whether this rank's stage owns it, and the group
            over which its gradients are summed.
        optimizer: The user's optimizer over the trained parameters; None if there is none.
        loss_fn: The user's loss, for a pipeline.
    """

    modules: tuple[Any, ...]
    plan: Plan
    device: Any
    groups: Mapping[tuple[MeshAxis, ...], Any]
    tied: Sequence[tuple[Any, bool, Any]] = ()
    optimizer: Any = None
    loss_fn: Callable[..., Any] | None = None


def split_parameters(module: Any, plan: Plan) -> Iterator[Any]:
    """Iterate over the parameters of a module of which other ranks along ``tensor`` have other parts."""
    split = {
        path
        for spec in plan.tree.values()
        for path in spec.paths
        if plan.mesh.tensor > 1 and any(shard.mesh_axis == "tensor" for shard in spec.shards)
    }
    return (parameter for path, parameter in module.named_parameters() if path in split)


@frozen
class Wrapped:
    """A model as a runtime wants it.

    Args:
        model: What is trained: the module, or the runtime's engine around it.
        optimizer: The runtime's optimizer, or the given one; None if there is none.
        extras: Whatever else the runtime returned, by name.
    """

    model: Any
    optimizer: Any
    extras: frozendict[str, Any] = field(factory=frozendict, converter=frozendict)
