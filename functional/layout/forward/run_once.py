"""Skip repeated layers of a model that runs on fake tensors: the second layer of a family runs in place of the rest."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from attrs import Factory, define
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from ...model.repeated_layers import LayerCall, RepeatedLayers, Representative

if TYPE_CHECKING:
    from collections.abc import Iterable


def _no_key(_: Tensor) -> None:
    """Tell tensors apart by shape and dtype alone."""


@define
class SkippedLayers(RepeatedLayers):
    """Repeated layers in a run on fake tensors, of which only the first two of each family run.

    The first layer may save, or be given, tensors that all layers share; so the second is the representative. Skipped layers
    return its very tensors, so that the layers after them, and the backward pass, are as if they had run.

    Args:
        tensor_key: Returns a further key of a tensor, in which the arguments of repeated layers must agree.
        representative_of: For each layer that was skipped, the layer that stands for it, by path.
    """

    tensor_key: Callable[[Tensor], Hashable] = _no_key
    representative_of: dict[str, str] = Factory(dict)

    def first(self, call: LayerCall, leaves: list[Any], structure: TreeSpec) -> Any:
        """Run a layer that repeats none."""
        result, representative = self.run(call, *tree_unflatten(leaves, structure))
        if representative is not None:
            self.representatives.setdefault(call.key, []).append(representative)
        return result

    def repeat(self, call: LayerCall, representative: Representative, leaves: list[Any], structure: TreeSpec) -> Any:
        """Run the second layer of a family and let it stand for the rest; skip the rest."""
        if representative.is_second:
            self.representative_of[call.path] = representative.path
            self.count(call.path, representative)
            return tree_unflatten(representative.returned, representative.structure)
        result, second = self.run(call, *tree_unflatten(leaves, structure))
        if second is not None:
            known = self.representatives[call.key]
            known[known.index(representative)] = second.as_second()
        return result

    def argument_key(self, leaf: Any) -> Hashable:
        """Return a key that is equal for arguments that are alike."""
        return super().argument_key(leaf), self.tensor_key(leaf) if isinstance(leaf, Tensor) else None

    @property
    def is_sound(self) -> bool:
        """Whether each skipped layer and each representative was called once, so that counts of one hold for the other."""
        layers = {*self.representative_of, *self.representative_of.values()}
        return all(self.num_calls.get(path) == 1 for path in layers)

    def repeats_of(self, path: str) -> Iterable[str]:
        """Map the path of a module or tensor in a representative to its path in each layer that was skipped for it."""
        for skipped, representative in self.representative_of.items():
            if f"{path}.".startswith(f"{representative}."):
                yield skipped + path.removeprefix(representative)
