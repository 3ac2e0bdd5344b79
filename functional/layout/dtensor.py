"""A module's tensors as DTensors, so that torch's own tools see the global ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ...specs.mesh import MODEL_AXES, STAGE_AXES
from ..model.copy import get_tensor, like, put_tensor, tied
from .dtensor_hooks import call_locally

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from ...specs.mesh import Mesh, MeshAxis
    from ...specs.param import ParamSpec


def to_dtensors(module: nn.Module, specs: Iterable[ParamSpec], mesh: Mesh, device_mesh: DeviceMesh) -> None:
    """Make a module's local tensors the parts of DTensors; it still computes with its local tensors.

    Args:
        module: What holds them; parameters and buffers keep their memory, attributes and ties.
        specs: The tensors.
        mesh: The plan's mesh.
        device_mesh: The same with the mesh axes of a stage as dimensions.
    """
    # one object for all: whether two meshes are the same is asked again and again
    meshes: dict[tuple[str, ...], DeviceMesh] = {STAGE_AXES: device_mesh}
    for spec in specs:
        on, local = placements(spec, mesh), get_tensor(module, spec.path)
        if (names := tuple(on)) not in meshes:
            meshes[names] = device_mesh[names]
        first = like(local, _dtensor(local.detach(), spec, on, meshes[names]))
        put_tensor(module, spec.path, first)
        for path in spec.tie:
            put_tensor(module, path, tied(get_tensor(module, path), first))
    call_locally(module)


def placements(spec: ParamSpec, mesh: Mesh) -> dict[MeshAxis, int | None]:
    """Return the dimensions of the device mesh that a tensor is on, each with the axis that it splits; None for none.

    All are on ``tensor``, on ``data`` only those that it splits: of others ``fully_shard`` may still make its own parts, and
    nothing says that their gradients are the same along an axis that carries batches.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard
    >>> placements(ParamSpec("down.weight", (8, 4), "float32", shards=(Shard(1),)), Mesh(data=2, tensor=2))
    {'tensor': 1}
    """
    split: dict[MeshAxis, int] = {shard.mesh_axis: shard.axis for shard in spec.shards if mesh.num(shard.mesh_axis) > 1}
    return {mesh_axis: split.get(mesh_axis) for mesh_axis in STAGE_AXES if mesh_axis in (*split, *MODEL_AXES)}


def _dtensor(local: Tensor, spec: ParamSpec, on: Mapping[MeshAxis, int | None], device_mesh: DeviceMesh) -> DTensor:
    """Return the DTensor of which this rank's part is a tensor; nothing is sent, or copied."""
    whole = torch.empty(spec.orig_shape, device="meta")
    put = [Replicate() if axis is None else Shard(axis) for axis in on.values()]
    return DTensor.from_local(local, device_mesh, put, shape=whole.shape, stride=whole.stride())
