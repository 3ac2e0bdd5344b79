"""Sums of gradients that splits ask for: several ranks hold the same part, and use it on different activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...specs.layout_steps import SumGradient
from ...specs.mesh import unsplit, whole_of
from ...specs.paths import module_of, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...specs.mesh import Mesh
    from ...specs.tree import SpecTree


def shared_gradients(mesh: Mesh, tree: SpecTree) -> Iterator[SumGradient]:
    """Iterate over the sums of gradients of repeated granules and of experts.

    Each path of a tied tensor has a sum of its own, as a module of its own uses it.

    >>> from shardplan.specs import Mesh, ParamSpec, Shard, SpecTree
    >>> experts = ParamSpec("experts.up", (4, 8), "float32", shards=(Shard(0, "expert"),))
    >>> print(*shared_gradients(Mesh(data=4, expert=2), SpecTree([experts])))
    gradient of up summed@expert_data / 4
    """
    first = mesh.coordinate(0)
    for spec in tree.values():
        for shard in spec.shards if spec.requires_grad else ():
            size, num = spec.orig_shape[shard.axis], mesh.num(shard.mesh_axis)
            if num == 1 or shard.misfit(size, num):
                continue
            held = shard.held(size, first)
            for path in spec.paths:
                module, name = module_of(path), name_of(path)
                if (whole := whole_of(shard.mesh_axis)) != shard.mesh_axis:
                    (rest,) = unsplit([whole], [shard.mesh_axis])
                    yield SumGradient(module, name, rest, divide=mesh.num(whole))
                elif any(part.num_holders > 1 for part in held):
                    sharing = tuple((part.stop - part.start, part.num_holders) for part in held)
                    yield SumGradient(module, name, shard.mesh_axis, shard.axis, sharing)
