"""The records that a dialect gets and returns, and the shares of ranks in a gradient's norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from attrs import field, frozen
from frozendict import frozendict

from ...specs.mesh import MODEL_AXES, Coordinate, MeshAxis, unsplit
from ...specs.param import ParamSpec
from ...specs.plan import Plan


@frozen
class Handover:
    """A filled module on its way to a runtime.

    Args:
        modules: This rank's torch modules: its stages, or the whole model.
        plan: The plan that filled them.
        device: The device of their tensors.
        groups: This rank's process group along each set of mesh axes that the dialect asked for.
        tied: Trained tensors that other stages hold too: the parameter, whether this rank's stage owns it, and the group
            over which its gradients are summed.
        optimizer: The user's optimizer over the trained parameters, if any.
        loss_fn: The user's loss, for a pipeline.
    """

    modules: tuple[Any, ...]
    plan: Plan
    device: Any
    groups: Mapping[tuple[MeshAxis, ...], Any]
    tied: Sequence[tuple[Any, bool, Any]] = ()
    optimizer: Any = None
    loss_fn: Callable[..., Any] | None = None


def norm_shares(module: Any, plan: Plan, coordinate: Coordinate) -> Iterator[tuple[Any, NormShare]]:
    """Iterate over the parameters of a module, each with the rank's share of its gradient's norm."""
    by_path = {path: norm_share(spec, coordinate) for spec in plan.tree.values() for path in spec.paths}
    for path, parameter in module.named_parameters():
        if path in by_path:
            yield parameter, by_path[path]


def split_experts(plan: Plan) -> list[str]:
    """Return the paths of expert parameters, split over ``expert``, whose gradients the plan sums."""
    return [path for spec in plan.tree.values() for path in spec.paths if plan.mesh.expert > 1 and spec.on("expert")]


@frozen
class NormShare:
    """The part of a gradient that a rank counts in the norm, so that ranks along ``tensor`` count each element once.

    Args:
        axis: The split axis; 0 for a whole tensor.
        parts: Intervals of the rank's shard along that axis; None for the whole shard.
        is_split: Whether the tensor is split over ``tensor``.
        is_expert: Whether it is split over ``expert``.
    """

    axis: int
    parts: tuple[tuple[int, int], ...] | None
    is_split: bool
    is_expert: bool


def norm_share(spec: ParamSpec, coordinate: Coordinate) -> NormShare:
    """Return a rank's share of the norm of a tensor's gradient; repeated granules count on their first holder.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard
    >>> qkv = ParamSpec("qkv", (16, 2), "float32", shards=(Shard(0, blocks=(8, 4, 4), granule=4, replicate=True),))
    >>> [norm_share(qkv, Mesh(tensor=2).coordinate(rank)).parts for rank in (0, 1)]
    [None, ((0, 4),)]
    """
    mesh = coordinate.mesh
    is_expert = mesh.expert > 1 and spec.on("expert") is not None
    shards = [shard for shard in spec.shards if shard.mesh_axis in MODEL_AXES and mesh.num(shard.mesh_axis) > 1]
    counts = coordinate.is_first(*unsplit(MODEL_AXES, [shard.mesh_axis for shard in shards]))
    if not shards or not counts:
        return NormShare(0, None if counts else (), is_split=bool(shards), is_expert=is_expert)
    shard = shards[0]
    parts: list[tuple[int, int]] = []
    place = 0
    held = shard.held(spec.orig_shape[shard.axis], coordinate)
    for part in held:
        size = part.stop - part.start
        parts += [(place, place + size)] if part.holder == 0 else []
        place += size
    counted = None if len(parts) == len(held) else tuple(parts)
    return NormShare(shard.axis, counted, is_split=True, is_expert=is_expert)


@frozen
class Wrapped:
    """A model in the hands of its runtime.

    Args:
        model: The model to train: the module, or the runtime's engine around it.
        optimizer: The runtime's optimizer, or the user's, if any.
        extras: Other results of the runtime, by name.
        norm: The norm of the whole model's gradient; None if it is not known.
    """

    model: Any
    optimizer: Any
    extras: frozendict[str, Any] = field(factory=frozendict, converter=frozendict)
    norm: Norm | None = None


class Norm(Protocol):
    """The norm of the whole model's gradient, which is spread over ranks; every rank asks."""

    def norm(self) -> Any:
        """Return the norm."""
        ...

    def clip(self, max_norm: float) -> Any:
        """Scale all gradients so that their norm is at most ``max_norm``; return the norm before."""
        ...
