"""A rank's shards of the parameters, in the order in which its module names them."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

from attrs import frozen

from ....specs.dtypes import num_bytes

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.param import ParamSpec
    from ....specs.plan import Plan


@frozen
class LocalParameter:
    """A rank's shard of a parameter.

    Args:
        spec: The parameter.
        numel: Elements of the shard.
        dtype: Their dtype while training.
        has_gradient: Whether a gradient reaches it; taken for true where no micro-batch was followed.
    """

    spec: ParamSpec
    numel: int
    dtype: str
    has_gradient: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the shard."""
        return self.numel * num_bytes(self.dtype)

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer updates it."""
        return self.spec.requires_grad


def local_parameters(plan: Plan, coordinate: Coordinate, cast_to: str | None = None) -> list[LocalParameter]:
    """Return a rank's shards of the parameters.

    Args:
        plan: The plan.
        coordinate: The rank's.
        cast_to: Dtype to which the runtime casts floating-point parameters; None if they are left as they are.
    """
    unreached = set(plan.microbatch.without_gradient) if plan.microbatch else set[str]()
    return [
        LocalParameter(
            spec,
            prod(spec.local_shape(coordinate)),
            cast_to if cast_to and spec.dtype in _CAST else spec.dtype,
            has_gradient=spec.requires_grad and spec.path not in unreached,
        )
        for spec in plan.tree.values()
        if spec.kind == "parameter" and coordinate.pipe in spec.places(plan.mesh)
    ]


def backward_order(parameters: Iterable[LocalParameter]) -> list[LocalParameter]:
    """Return parameters in the order of the backward pass: modules reversed, parameters within a module as they are.

    >>> from shardplan.specs import ParamSpec
    >>> names = ["a.weight", "b.weight", "b.bias"]
    >>> some = [LocalParameter(ParamSpec(name, (1,), "float32"), 1, "float32", has_gradient=True) for name in names]
    >>> [parameter.spec.path for parameter in backward_order(some)]
    ['b.weight', 'b.bias', 'a.weight']
    """
    modules: dict[str, list[LocalParameter]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.spec.module, []).append(parameter)
    return [parameter for module in reversed(modules.values()) for parameter in module]


def total_bytes(parameters: Iterable[LocalParameter]) -> int:
    """Return the bytes of all shards."""
    return sum(parameter.num_bytes for parameter in parameters)


def total_numel(parameters: Iterable[LocalParameter]) -> int:
    """Return the elements of all shards."""
    return sum(parameter.numel for parameter in parameters)


_CAST = ("float16", "bfloat16", "float32", "float64")
