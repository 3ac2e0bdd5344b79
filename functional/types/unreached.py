"""Parts of a model that a run does not reach: nothing is known of how their split tensors compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from ...specs.equality import Trust, Unfollowed
from ...specs.paths import module_of, name_of
from ..layout.local_model import LocalModel
from .tape import Tape, references

if TYPE_CHECKING:
    from ...specs.param import ParamSpec


@frozen
class Reach:
    """The tensors of a model that a run computes with.

    Args:
        used: Canonical paths of the tensors that its operators take.
        representative_of: Repeated layers that did not run, each with the layer that ran in its place.
    """

    used: frozenset[str]
    representative_of: Mapping[str, str]

    @classmethod
    def of(cls, local: Tape) -> Reach:
        """Return the reach of a run."""
        used = {local.values[ref.value].path for call in local.calls for ref in references(call)}
        return cls(frozenset(used), {layer.path: layer.representative for layer in local.skipped})

    def takes(self, spec: ParamSpec) -> bool:
        """Tell whether the run takes a tensor, or the same tensor of the layer that ran in place of a repeated layer."""
        return any(path in self.used for tie in spec.paths for path in (tie, *self._in_representatives(tie)))

    def _in_representatives(self, path: str) -> Iterator[str]:
        module = path
        while module := module_of(module):
            if module in self.representative_of:
                yield self.representative_of[module] + path.removeprefix(module)


def unreached(subject: LocalModel, local: Tape, trusts: Sequence[Trust] = ()) -> Iterator[Unfollowed]:
    """Iterate over the modules whose split tensors no operator of a run takes, other than trusted modules.

    Args:
        subject: The model that was followed.
        local: The run of a rank.
        trusts: Modules of which the user's word is taken.
    """
    first, reach = subject.mesh.coordinate(0), Reach.of(local)
    lost: dict[str, list[str]] = {}
    for spec in subject.tree.values():
        is_trusted = any(_is_within(path, trust.module) for trust in trusts for path in spec.paths)
        if "tensor" in spec.mesh_axes(first) and not is_trusted and not reach.takes(spec):
            lost.setdefault(module_of(spec.path), []).append(name_of(spec.path))
    for module, names in lost.items():
        cause = f"the example inputs do not reach it: nothing is computed with its split {' and '.join(names)}"
        yield Unfollowed(module, "", cause)


def is_unreached(module: str, subject: LocalModel, reach: Reach) -> bool:
    """Tell whether a module holds tensors, and a run takes none of them."""
    held = [spec for spec in subject.tree.values() if any(_is_within(path, module) for path in spec.paths)]
    return bool(held) and not any(map(reach.takes, held))


def _is_within(path: str, module: str) -> bool:
    return not module or path.startswith(f"{module}.")
