"""What one rank holds of the parameters, in the order in which its module names them."""

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
    """A rank's part of one parameter.

    Args:
        spec: The parameter.
        numel: Elements of the part.
        dtype: torch's name of their type while training.
        has_gradient: Whether a gradient reaches it, as far as it is known.
    """

    spec: ParamSpec
    numel: int
    dtype: str
    has_gradient: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return self.numel * num_bytes(self.dtype)

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer works on it."""
        return self.spec.requires_grad


def local_parameters(plan: Plan, coordinate: Coordinate, dtype: str | None = None) -> list[LocalParameter]:
    """Return a rank's parameters.

    Args:
        plan: The plan.
        coordinate: Where the rank stands.
        dtype: What the runtime casts floating-point parameters to; None if it leaves them.
    """
    unreached = set(plan.microbatch.without_gradient) if plan.microbatch else set[str]()
    return [
        LocalParameter(
            spec,
            prod(spec.local_shape(coordinate)),
            dtype if dtype and spec.dtype in _CAST else spec.dtype,
            has_gradient=spec.requires_grad and spec.path not in unreached,
        )
        for spec in plan.tree.values()
        if spec.kind == "parameter" and coordinate.pipe in spec.places(plan.mesh)
    ]


def backward_order(parameters: Iterable[LocalParameter]) -> list[LocalParameter]:
    """Return parameters in the order in which their gradients come: the last module's first.

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
    """Return the bytes of all of them."""
    return sum(parameter.num_bytes for parameter in parameters)


def total_numel(parameters: Iterable[LocalParameter]) -> int:
    """Return the elements of all of them."""
    return sum(parameter.numel for parameter in parameters)


_CAST = ("float16", "bfloat16", "float32", "float64")
