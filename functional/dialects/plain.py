"""No runtime: the module itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...specs.errors import Problem
from ...specs.finding import Finding
from .accounting.messages import Messages, crossings
from .accounting.state import State, whole_state
from .accounting.training import Training
from .handover import Handover, Wrapped
from .holding import Holding
from .stage_checks import one_stage_per_place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ...specs.layout_steps import LayoutStep
    from ...specs.mesh import Coordinate, Mesh, MeshAxis
    from ...specs.pipeline import Pipeline
    from ...specs.plan import Plan
    from ...specs.tree import SpecTree


class PlainDialect:
    """``target=None``: nothing is wrapped, and nothing averages gradients over ``data``."""

    pipeline_options: Sequence[str] = ()

    def check(
        self, mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any] | None
    ) -> list[Problem]:
        if config is not None:
            return [Problem("config", "it is given, and there is no target to read it", "Name one, e.g. target='deepspeed'")]
        return []

    def check_pipeline(
        self, mesh: Mesh, tree: SpecTree, pipeline: Pipeline | None, config: Mapping[str, Any] | None
    ) -> list[Problem]:
        return one_stage_per_place(mesh, pipeline) if pipeline else []

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        return ()

    def wrong_numbers(self, config: Mapping[str, Any]) -> Iterable[Problem]:
        return ()

    def training(self, plan: Plan) -> Training:
        return Training()

    def in_flight(self, plan: Plan, stage: int) -> int:
        return 1

    def state(self, plan: Plan, coordinate: Coordinate, alike: range | None = None) -> State:
        return whole_state(plan, coordinate)

    def messages(self, plan: Plan, coordinate: Coordinate) -> Iterable[Messages]:
        return crossings(plan, coordinate.pipe, num_microbatches=1)

    def findings(self, plan: Plan) -> Iterable[Finding]:
        if plan.mesh.data > 1:
            cause = f"data={plan.mesh.data}, and without a target nothing averages gradients over it"
            has_experts = any(spec.on("expert") for spec in plan.tree.values()) and plan.mesh.expert > 1
            target = "torch" if has_experts else "deepspeed"
            but = ", all but those of experts, which the plan averages" if has_experts else ""
            fix = f"Use target={target!r}, or average them yourself before each step{but}"
            yield Finding("SP014", "warning", "", cause, fix)

    def check_installed(self) -> list[Problem]:
        return []

    def check_loss(self, plan: Plan, loss_fn: object) -> list[Problem]:
        if loss_fn is None:
            return []
        return [
            Problem("loss_fn", "it is given, and there is no target to call it", "Name one, or compute the loss yourself")
        ]

    def wrap(self, handover: Handover) -> Wrapped:
        from .gradient_norm import GradientNorm  # torch, which the audit does without

        try:
            norm = GradientNorm.of(handover)
        except KeyError:  # no step needs the group
            norm = None
        return Wrapped(handover.modules[0], handover.optimizer, norm=norm)

    def holding(self) -> Holding:
        return Holding()
