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
        takers: For each tensor that operators take, by its canonical path, the modules in which they are called.
        representative_of: Repeated layers that did not run, each with the layer that ran in its place.
    """

    takers: Mapping[str, frozenset[str]]
    representative_of: Mapping[str, str]

    @classmethod
    def of(cls, local: Tape) -> Reach:
        """Return the reach of a run."""
        takers: dict[str, set[str]] = {}
        for call in local.calls:
            for ref in references(call):
                takers.setdefault(local.values[ref.value].path, set()).add(call.module)
        named = {path: frozenset(modules) for path, modules in takers.items() if path}
        return cls(named, {layer.path: layer.representative for layer in local.skipped})

    def takes(self, spec: ParamSpec) -> bool:
        """Tell whether an operator takes a tensor, or the same tensor of the layer that ran in place of a repeated layer."""
        return any(self.followed(path) in self.takers for path in spec.paths)

    def goes_past(self, module: str, spec: ParamSpec) -> bool:
        """Tell whether an operator takes a tensor of a module elsewhere than in another module that holds it too."""
        elsewhere = {self.followed(module_of(path)) for path in spec.paths if not _is_within(path, module)}
        return any(self.takers.get(self.followed(path), elsewhere) - elsewhere for path in spec.paths)

    def followed(self, path: str) -> str:
        """Map a path in a repeated layer that did not run to the same path in the layer that ran in its place."""
        around = path
        while around and around not in self.representative_of:
            around = module_of(around)
        return self.representative_of[around] + path.removeprefix(around) if around else path


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
    """Tell whether a module that is not called holds tensors, and no code goes past it to take one of them."""
    held = [spec for spec in subject.tree.values() if any(_is_within(path, module) for path in spec.paths)]
    return bool(held) and not any(reach.goes_past(module, spec) for spec in held)


def _is_within(path: str, module: str) -> bool:
    return not module or path.startswith(f"{module}.")
