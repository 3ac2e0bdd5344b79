"""Convert a mesh to torch's ``DeviceMesh``, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...specs.mesh import MESH_AXES, Mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ...specs.mesh import MeshAxis


def to_device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """Return a ``DeviceMesh`` with dimensions pipe, data, tensor; it makes its own process groups.

    ``expert``, a part of ``data``, is no dimension of it.

    Args:
        mesh: A mesh as large as the world.
        device_type: ``cuda`` or ``cpu``.
    """
    return init_device_mesh(device_type, tuple(mesh.num(m) for m in MESH_AXES), mesh_dim_names=MESH_AXES)


def of_groups(mesh: Mesh, mesh_axes: Sequence[MeshAxis], groups: Sequence[ProcessGroup], device_type: str) -> DeviceMesh:
    """Return a ``DeviceMesh`` over existing process groups; no rank waits for another.

    Args:
        mesh: A mesh as large as the world.
        mesh_axes: Its dimensions, in mesh order: all mesh axes that have more than one rank.
        groups: This rank's group along each.
        device_type: ``cuda`` or ``cpu``.
    """
    ranks = torch.arange(mesh.num_ranks).view([mesh.num(mesh_axis) for mesh_axis in mesh_axes])
    return DeviceMesh.from_group([*groups], device_type, ranks, mesh_dim_names=tuple(mesh_axes))


def from_device_mesh(device_mesh: DeviceMesh) -> Mesh:
    """Return the mesh of a ``DeviceMesh`` whose dimensions are among pipe, data, tensor, in this order.

    Raises:
        ValueError: If its names or their order differ, or its ranks are not 0, 1, 2, ... in order.
    """
    names = device_mesh.mesh_dim_names or ()
    if not names or [n for n in MESH_AXES if n in names] != list(names):
        msg = f"dimensions {names} are not {', '.join(MESH_AXES)}, in this order"
        raise ValueError(msg)
    ranks = device_mesh.mesh.flatten().tolist()
    if ranks != list(range(len(ranks))):
        msg = f"its ranks are {ranks}, and those of a mesh are 0 to {len(ranks) - 1} in order"
        raise ValueError(msg)
    return Mesh(**dict(zip(names, device_mesh.mesh.shape, strict=True)))
