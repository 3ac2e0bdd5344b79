"""What ranks hold of the model's own tensors."""

from __future__ import annotations

from functools import lru_cache

from ...specs.mesh import Mesh
from ...specs.param import ParamSpec
from ...specs.paths import module_of
from .axes import axis_of, parts_in, whole
from .held import Held, whole_of


@lru_cache(maxsize=4096)
def tensor_of(spec: ParamSpec, mesh: Mesh) -> Held:
    """Return what ranks along ``tensor`` hold of a tensor of the model.

    Padding is zero, and stays so only where the tensor is not trained.
    """
    shard = spec.on("tensor")
    if shard is None or mesh.tensor == 1:
        return whole_of(spec.orig_shape)
    split = axis_of(shard, spec.orig_shape[shard.axis], mesh)
    if parts_in(split) is None:
        return whole_of(spec.orig_shape)
    axes = tuple(split if at == shard.axis else whole(size) for at, size in enumerate(spec.orig_shape))
    padding = "" if shard.pad_to_multiple == 1 else "any" if spec.requires_grad else "zero"
    return Held("parts", axes, padding=padding, origin=module_of(spec.path) if padding else "")
