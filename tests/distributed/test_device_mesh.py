"""A mesh as torch's DeviceMesh, and back."""

from __future__ import annotations

import pytest

from shardplan.functional import from_device_mesh, to_device_mesh
from shardplan.specs import Mesh
from tests.helpers.ranks import results, run_ranks


def there_and_back(rank):
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    mesh = Mesh(data=2, tensor=2)
    device_mesh = to_device_mesh(mesh, "cpu")
    assert from_device_mesh(device_mesh) == mesh
    here = mesh.coordinate(rank)
    assert list(device_mesh.get_coordinate()) == [here.pipe, here.data, here.tensor]
    assert from_device_mesh(init_device_mesh("cpu", (4,), mesh_dim_names=("tensor",))) == Mesh(tensor=4)
    with pytest.raises(ValueError, match=r"dimensions \('tensor', 'data'\) are not pipe, data, tensor, in this order"):
        from_device_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("tensor", "data")))
    with pytest.raises(ValueError, match=r"its ranks are \[0, 2, 1, 3\]"):
        from_device_mesh(DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("data", "tensor")))
    return True


def test_there_and_back():
    assert results(run_ranks(there_and_back, 4)) == [True] * 4
