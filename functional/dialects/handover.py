"""What a dialect gets, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen
from frozendict import frozendict

from ...specs.mesh import Coordinate, MeshAxis
from ...specs.param import ParamSpec
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


def counted_parts(module: Any, plan: Plan, coordinate: Coordinate) -> Iterator[tuple[Any, Counted]]:
    """Iterate over the trained parameters of a module, and what of them counts on this rank, along ``tensor``."""
    by_path = {path: counted_of(spec, coordinate) for spec in plan.tree.values() for path in spec.paths}
    for path, parameter in module.named_parameters():
        if parameter.requires_grad and path in by_path:
            yield parameter, by_path[path]


def split_experts(plan: Plan) -> list[str]:
    """Return the paths of the tensors of which ranks along ``data`` have others: their gradients are summed by the plan."""
    return [path for spec in plan.tree.values() for path in spec.paths if plan.mesh.expert > 1 and spec.on("expert")]


@frozen
class Counted:
    """What of a tensor's gradient counts on one rank, so that over the ranks along ``tensor`` all of it counts once.

    Args:
        axis: Axis that is split; 0 for a whole tensor.
        parts: Entries of that axis of what the rank holds: the first, and the one after the last; None for all of them.
        is_split: Whether other ranks have other parts.
        is_expert: Whether ranks along ``expert`` have other experts.
    """

    axis: int
    parts: tuple[tuple[int, int], ...] | None
    is_split: bool
    is_expert: bool


def counted_of(spec: ParamSpec, coordinate: Coordinate) -> Counted:
    """Return what of a tensor counts on the rank at a coordinate: of repeated granules, those of the first holder.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard
    >>> qkv = ParamSpec("qkv", (16, 2), "float32", shards=(Shard(0, blocks=(8, 4, 4), granule=4, replicate=True),))
    >>> [counted_of(qkv, Mesh(tensor=2).coordinate(rank)).parts for rank in (0, 1)]
    [None, ((0, 4),)]
    """
    mesh, shard = coordinate.mesh, spec.on("tensor")
    is_expert = mesh.expert > 1 and spec.on("expert") is not None
    if shard is None or mesh.tensor == 1:
        return Counted(0, None if coordinate.is_first("tensor") else (), is_split=False, is_expert=is_expert)
    parts: list[tuple[int, int]] = []
    place = 0
    held = shard.held(spec.orig_shape[shard.axis], coordinate)
    for part in held:
        size = part.stop - part.start
        parts += [(place, place + size)] if part.holder == 0 else []
        place += size
    counted = None if len(parts) == len(held) else tuple(parts)
    return Counted(shard.axis, counted, is_split=True, is_expert=is_expert)


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
