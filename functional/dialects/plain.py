"""No runtime: the module itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...specs.errors import Problem
from .handover import Handover, Wrapped
from .stage_checks import one_stage_a_place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...specs.mesh import Mesh, MeshAxis
    from ...specs.pipeline import Pipeline
    from ...specs.plan import Plan
    from ...specs.steps import LayoutStep
    from ...specs.tree import SpecTree


class PlainDialect:
    """``target=None``: nothing is wrapped, and nothing averages gradients over ``data``."""

    def check(
        self, mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any] | None
    ) -> list[Problem]:
        if config is not None:
            return [Problem("config", "it is given, and there is no target to read it", "Name one, e.g. target='deepspeed'")]
        return []

    def check_pipeline(
        self, mesh: Mesh, tree: SpecTree, pipeline: Pipeline | None, config: Mapping[str, Any] | None
    ) -> list[Problem]:
        return one_stage_a_place(mesh, pipeline) if pipeline else []

    def check_loss(self, plan: Plan, loss_fn: object) -> list[Problem]:
        if loss_fn is None:
            return []
        return [
            Problem("loss_fn", "it is given, and there is no target to call it", "Name one, or compute the loss yourself")
        ]

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        return ()

    def wrap(self, handover: Handover) -> Wrapped:
        return Wrapped(handover.modules[0], handover.optimizer)
