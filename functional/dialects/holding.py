"""How a runtime keeps parameters and optimizer states, once it has a module: asked by whoever saves or loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

MASTER = "fp32"
"""Name of the float32 copy among the states of a tensor of fewer bits."""


class Holding:
    """Parameters and optimizers as torch keeps them. A runtime that keeps them otherwise overrides the methods."""

    def in_pieces(self, tensor: Any) -> str:
        """Return why a rank does not have its tensor whole; empty if it has."""
        return ""

    def whole_shape(self, tensor: Any) -> tuple[int, ...]:
        """Return the shape of a tensor; of a parameter in pieces the shape when it is whole."""
        return tuple(tensor.shape)

    def gathered(self, tensor: Any) -> AbstractContextManager[Any]:
        """Gather a parameter in pieces for the duration of the block; all ranks that have a piece enter it."""
        return nullcontext()

    def own_optimizer(self, optimizer: Any) -> OwnOptimizer | None:
        """Return access to an optimizer of the runtime's own; None for an optimizer of torch's."""
        return None


class OwnOptimizer(Protocol):
    """Access to an optimizer that keeps its states otherwise than by parameter."""

    @property
    def inner(self) -> Any:
        """The optimizer of torch's within, with ``param_groups``."""
        ...

    @property
    def trained(self) -> Sequence[Sequence[Any]]:
        """The tensors that it trains, group by group."""
        ...

    def states(self, held: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, tuple[str, int]]]:
        """Return the states of the tensors that this rank holds, and the dtype and number of axes of each.

        Both are by ``name/path``. A state has the local shape of its tensor, or no axes, and may be made when it is read.

        Args:
            held: The tensors that this rank holds, by path.

        Raises:
            PlanError: If they cannot be read.
        """
        ...

    def give(
        self, held: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]
    ) -> None:
        """Restore states and settings.

        Args:
            held: The tensors that this rank holds, by path.
            states: States by path and name, each of the local shape of its tensor, or without axes.
            settings: Settings of the groups, in order.

        Raises:
            PlanError: If they cannot be restored.
        """
        ...


def like_before(before: Any, value: Any) -> Any:
    """Convert a setting that was read from JSON to the type that it had: JSON has neither tuples nor tensors."""
    if hasattr(before, "new_full"):
        return before.new_full(before.shape, value)
    return tuple(value) if isinstance(before, tuple) else value
