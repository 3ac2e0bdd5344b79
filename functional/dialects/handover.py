"""What a dialect gets, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen
from frozendict import frozendict

from ...specs.mesh import MeshAxis
from ...specs.plan import Plan


@frozen
class Handover:
    """A filled module on its way to a runtime.

    Args:
        module: This rank's torch module.
        plan: The plan that it was filled by.
        groups: This rank's process group along each set of mesh axes that the dialect asked for.
        optimizer: The user's optimizer over the trained parameters; None if there is none.
        loss_fn: The user's loss, for a pipeline.
    """

    module: Any
    plan: Plan
    groups: Mapping[tuple[MeshAxis, ...], Any]
    optimizer: Any = None
    loss_fn: Callable[..., Any] | None = None


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
