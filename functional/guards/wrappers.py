"""Wrappers of torch that take ranks for copies of each other, around a module of which each has a part."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...specs.mesh import AXIS_NAMES, Mesh, MeshAxis
from ...specs.plan import Plan
from .error import TrainingError
from .parameters import is_fsdp

_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a module in which DDP looks for paths that it ignores, before it sends anything."""


class _IgnoredPaths(list[str]):
    """The paths that DDP ignores; the DDP that reads them is checked."""

    def __init__(self, paths: Iterable[str], mesh: Mesh, apart: tuple[MeshAxis, ...]) -> None:
        super().__init__(paths)
        self.mesh, self.apart = mesh, apart

    def __iter__(self) -> Iterator[str]:
        reader = sys._getframe(1).f_locals.get("self")  # noqa: SLF001  DDP, in its __init__
        if isinstance(reader, DistributedDataParallel):
            check_group(reader.process_group, self.mesh, self.apart, "DistributedDataParallel")
        return super().__iter__()


def axes_apart(plan: Plan) -> tuple[MeshAxis, ...]:
    """Return the mesh axes along which ranks hold other parts of the model."""
    split = {axis for spec in plan.tree.values() for axis in spec.mesh_axes(plan.mesh.coordinate(0))}
    return tuple(axis for axis in AXIS_NAMES if axis in {*split, "pipe"})


def refuse_foreign_ddp(module: nn.Module, plan: Plan) -> None:
    """Let DDP over a group that joins ranks with parts raise when it is made."""
    setattr(module, _IGNORED, _IgnoredPaths(getattr(module, _IGNORED, ()), plan.mesh, axes_apart(plan)))


def check_fsdp(module: nn.Module, plan: Plan) -> None:
    """Check the groups over which FSDP2 shares out a module's parameters.

    Raises:
        TrainingError: If one joins ranks that hold parts.
    """
    for inner in module.modules():
        if is_fsdp(inner):
            group: Any = getattr(inner, "_get_fsdp_state")()._fsdp_param_group  # noqa: B009, SLF001  torch has no other way
            info = None if group is None else group.mesh_info
            for name in ("shard_process_group", "replicate_process_group"):
                if (joined := getattr(info, name, None)) is not None:
                    check_group(joined, plan.mesh, axes_apart(plan), "fully_shard")


def check_group(group: Any, mesh: Mesh, apart: tuple[MeshAxis, ...], wrapper: str) -> None:
    """Check a group over which a wrapper keeps parameters alike, or shares them out.

    Raises:
        TrainingError: If it joins ranks that hold other parts of the model.
    """
    ranks = dist.get_process_group_ranks(group)
    joined = [axis for axis in apart if len({mesh.coordinate(rank).index(axis) for rank in ranks}) > 1]
    if not joined:
        return
    msg = (
        f"{wrapper} over ranks {', '.join(map(str, ranks))} takes them for copies of one module, and ranks along "
        f"{' and '.join(joined)} of {mesh} hold parts of it. Plan with target='torch' or 'deepspeed', which average over "
        "data alone, or give it a group along data"
    )
    raise TrainingError(msg)
