"""The dialect of DeepSpeed. DeepSpeed itself is imported only by ``check_installed`` and ``wrap``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....specs.errors import Problem
from ....specs.mesh import Mesh, MeshAxis
from ..accounting.training import Training
from ..stage_checks import one_stage_per_place, untrained_places
from .boundaries import in_flight
from .checks import another_version, check_boundaries, check_config, check_layout, not_installed
from .config import Zero, num_microbatches, optimizer_of, wrong_numbers
from .memory import deepspeed_state
from .traffic import deepspeed_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ....specs.finding import Finding
    from ....specs.layout_steps import LayoutStep
    from ....specs.mesh import Coordinate
    from ....specs.pipeline import Pipeline
    from ....specs.plan import Plan
    from ....specs.tree import SpecTree
    from ..accounting.messages import Messages
    from ..accounting.state import State
    from ..handover import Handover, Wrapped
    from ..holding import Holding


class DeepSpeedDialect:
    """``target="deepspeed"``: ``deepspeed.initialize`` with the plan's config and the mesh as ``mpu``."""

    pipeline_options: Sequence[str] = ()

    def check(
        self, mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any] | None
    ) -> list[Problem]:
        if not isinstance(config, Mapping):
            cause = (
                "DeepSpeed needs its configuration" if config is None else f"it is plain JSON values by name, not {config!r}"
            )
            fix = 'config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}'
            return [Problem("config", cause, fix)]
        return [*check_config(mesh, config), *check_layout(mesh, tree, layout, config)]

    def check_pipeline(
        self, mesh: Mesh, tree: SpecTree, pipeline: Pipeline | None, config: Mapping[str, Any] | None
    ) -> list[Problem]:
        if pipeline is None:
            return []
        return [
            *one_stage_per_place(mesh, pipeline),
            *untrained_places(mesh, tree),
            *check_boundaries(mesh, pipeline, config or {}),
        ]

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        return (("data",), ("tensor",))

    def wrong_numbers(self, config: Mapping[str, Any]) -> Iterable[Problem]:
        return wrong_numbers(config)

    def training(self, plan: Plan) -> Training:
        zero = Zero.of(plan)
        keeps = "its states are kept" if zero.wrapper == "none" else "its states and a float32 copy are kept"
        uneven = "ZeRO 2 leaves ranks that are alike different gradients: these are those of the rank with the most"
        return Training(
            num_microbatches=num_microbatches(plan),
            optimizer=optimizer_of(plan),
            cast_to=zero.half,
            without_gradient=f"DeepSpeed reduces zeros for it, {keeps}, and weight decay changes it",
            uneven_state=uneven if zero.stage == 2 else "",  # noqa: PLR2004  ZeRO 2
            own_copies="DeepSpeed keeps copies of its own, which would stay as they are",
        )

    def in_flight(self, plan: Plan, stage: int) -> int:
        return in_flight(plan, stage)

    def state(self, plan: Plan, coordinate: Coordinate, alike: range | None = None) -> State:
        return deepspeed_state(plan, coordinate, alike)

    def messages(self, plan: Plan, coordinate: Coordinate) -> Iterable[Messages]:
        return deepspeed_messages(plan, coordinate)

    def findings(self, plan: Plan) -> Iterable[Finding]:
        return another_version()

    def check_installed(self) -> list[Problem]:
        return not_installed()

    def check_loss(self, plan: Plan, loss_fn: Callable[..., Any] | None) -> list[Problem]:
        if not plan.pipeline:
            return [Problem("loss_fn", "it is for a pipeline, and this plan has one stage", "Compute the loss yourself")]
        last = plan.stages[-1].outputs
        if loss_fn is None and [output.shape for output in last] != [()]:
            cause = f"engine.train_batch needs a loss, and the last stage gives {', '.join(map(str, last))}"
            return [Problem("loss_fn", cause, "execute(plan, loss_fn=lambda output, target: ...)")]
        return []

    def wrap(self, handover: Handover) -> Wrapped:
        from .wrap import wrap

        return wrap(handover)

    def holding(self) -> Holding:
        from .holding import DeepSpeedHolding

        return DeepSpeedHolding()
