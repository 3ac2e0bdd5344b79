"""No runtime: the module itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...specs.errors import Problem
from .handover import Handover, Wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...specs.mesh import Mesh, MeshAxis
    from ...specs.tree import SpecTree


class PlainDialect:
    """``target=None``: nothing is wrapped, and nothing averages gradients over ``data``."""

    def check(self, mesh: Mesh, tree: SpecTree, config: Mapping[str, Any] | None) -> list[Problem]:
        if config is not None:
            return [Problem("config", "it is given, and there is no target to read it", "Name one, e.g. target='deepspeed'")]
        return []

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        return ()

    def wrap(self, handover: Handover) -> Wrapped:
        return Wrapped(handover.module, handover.optimizer)
