"""Adapters to runtimes, found by entry point: each can say what it takes (pure) and wrap a module (an effect)."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from ...specs.errors import Problem
from ...specs.pattern import closest
from .plain import PlainDialect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ...specs.mesh import Mesh, MeshAxis
    from ...specs.pipeline import Pipeline
    from ...specs.plan import Plan
    from ...specs.steps import LayoutStep
    from ...specs.tree import SpecTree
    from .handover import Handover, Wrapped

ENTRY_POINTS = "shardplan.dialects"
"""Entry point group under which a package offers a dialect: a class without arguments."""


class Dialect(Protocol):
    """What a runtime wants."""

    def check(
        self, mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any] | None
    ) -> list[Problem]:
        """Return what the runtime would refuse, or get wrong. Pure; the runtime is not imported."""
        ...

    def check_pipeline(
        self, mesh: Mesh, tree: SpecTree, pipeline: Pipeline | None, config: Mapping[str, Any] | None
    ) -> list[Problem]:
        """Return what the runtime would refuse, or get wrong, with these stages, or with none. Pure."""
        ...

    def check_loss(self, plan: Plan, loss_fn: Callable[..., Any] | None) -> list[Problem]:
        """Return why the runtime cannot train with this loss; None is none."""
        ...

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        """Return the sets of mesh axes along which the runtime needs process groups."""
        ...

    def wrap(self, handover: Handover) -> Wrapped:
        """Hand a filled module to the runtime."""
        ...


def find_dialect(target: str | None) -> tuple[Dialect | None, list[Problem]]:
    """Return the dialect of a target; for an unknown one a problem that lists the known."""
    if target is None:
        return PlainDialect(), []
    known = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if target in known:
        return known[target].load()(), []
    near = closest(str(target), known)
    fix = f"There are None, {', '.join(sorted(known))}" + (f"; the closest is {near[0]}" if near else "")
    return None, [Problem("target", f"{target!r} is unknown", fix)]
