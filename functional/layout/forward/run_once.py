"""Repeated modules of a model that is only looked at: the second of a family runs, and what it gave stands for the rest."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from attrs import Factory, define
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from ...model.repeated_layers import Call, Families, First

if TYPE_CHECKING:
    from collections.abc import Iterable


def _nothing(_: Tensor) -> None:
    """Know nothing of a tensor but its shape and dtype."""


@define
class Shortcut(Families):
    """The families of one run on fake tensors.

    The first of a family may keep, or be given, what all share; so it is the second that the others are like. They return
    its very tensors, so that what comes after is as if they had run, and so is what goes back.

    Args:
        known: What else is known of a tensor, in which those that modules are called with must agree.
        repeated: The modules that did not run, and the one that stands for each, by path.
    """

    known: Callable[[Tensor], Hashable] = _nothing
    repeated: dict[str, str] = Factory(dict)

    def first(self, call: Call, leaves: list[Any], spec: TreeSpec) -> Any:
        """Run the first of a family, or one that is like none."""
        returned, first = self.run(call, *tree_unflatten(leaves, spec))
        if first is not None:
            self.firsts.setdefault(call.key, []).append(first)
        return returned

    def repeat(self, call: Call, first: First, leaves: list[Any], spec: TreeSpec) -> Any:
        """Run the second of a family; let it stand for the others."""
        if first.is_second:
            self.repeated[call.path] = first.path
            self.count(call.path, first)
            return tree_unflatten(first.given, first.spec)
        returned, second = self.run(call, *tree_unflatten(leaves, spec))
        if second is not None:
            firsts = self.firsts[call.key]
            firsts[firsts.index(first)] = second.as_second()
        return returned

    def told_apart(self, leaf: Any) -> Hashable:
        """Return what must be the same of what modules are called with."""
        known = self.known(leaf) if isinstance(leaf, Tensor) else None
        return super().told_apart(leaf), known

    @property
    def is_sound(self) -> bool:
        """Whether each module that stands for another, and each other one, was called once: else counts are not theirs."""
        return all(self.num_calls.get(path) == 1 for path in {*self.repeated, *self.repeated.values()})

    def alike(self, path: str) -> Iterable[str]:
        """Return the paths that stand in the place of one, of a tensor or module, in those that it stands for."""
        for other, stands_for in self.repeated.items():
            if f"{path}.".startswith(f"{stands_for}."):
                yield other + path.removeprefix(stands_for)
