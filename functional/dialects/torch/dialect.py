"""torch alone: DDP around the tensor-parallel module, and its own pipelining where the model is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from attrs import evolve

from ....specs.errors import Problem
from ....specs.mesh import SPLIT_AXES
from ..accounting.training import Training, named_optimizer
from ..holding import Holding
from ..stage_checks import one_stage_per_place, untrained_places
from .accounting import in_flight, num_microbatches, torch_messages, torch_state
from .optimizer import check_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ....specs.finding import Finding
    from ....specs.layout_steps import LayoutStep
    from ....specs.mesh import Coordinate, Mesh, MeshAxis
    from ....specs.pipeline import Pipeline
    from ....specs.plan import Plan
    from ....specs.tree import SpecTree
    from ..accounting.messages import Messages
    from ..accounting.state import State
    from ..handover import Handover, Wrapped

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved_1f1b"]
"""torch's pipeline schedules: GPipe, 1F1B, and 1F1B with several stages at each place."""

_EXAMPLE = 'config={"schedule": "1f1b", "num_microbatches": 8}'
_OPTIONS = ("schedule", "num_microbatches", "optimizer")


class TorchDialect:
    """``target="torch"``.

    Without stages: ``DistributedDataParallel`` over ``data``, the module itself where ``data`` is 1. With stages: a
    ``TorchPipeline``; the config names the ``schedule`` and ``num_microbatches``. In both cases it may name the
    ``optimizer``, which is then made over the trained parameters.
    """

    pipeline_options: Sequence[str] = ("schedule", "num_microbatches")

    def check(
        self, mesh: Mesh, tree: SpecTree, layout: Sequence[LayoutStep], config: Mapping[str, Any] | None
    ) -> list[Problem]:
        split = [spec for spec in tree.values() if spec.kind == "parameter" and spec.on("data")]
        cause = "it is split over 'data', over which DDP averages gradients as if its parts were copies"
        problems = [Problem(spec.path, cause, "Split it over 'tensor'", spec.type) for spec in split if mesh.data > 1]
        if config is not None and not isinstance(config, Mapping):
            problems.append(Problem("config", f"it is plain JSON values by name, not {config!r}", _EXAMPLE))
        unknown = sorted(set(config) - set(_OPTIONS)) if isinstance(config, Mapping) else []
        there = "There are optimizer, and for a pipeline schedule and num_microbatches"
        problems += [Problem(f"config.{name}", "torch is not asked for it", there) for name in unknown]
        return [*problems, *check_optimizer(config)] if isinstance(config, Mapping) else problems

    def check_pipeline(
        self, mesh: Mesh, tree: SpecTree, pipeline: Pipeline | None, config: Mapping[str, Any] | None
    ) -> list[Problem]:
        if pipeline is None:
            cause = "it is for a pipeline, and the model is not cut"
            asked = [name for name in self.pipeline_options if isinstance(config, Mapping) and name in config]
            return [Problem(f"config.{name}", cause, "Leave it out") for name in asked]
        if config is None:
            return [Problem("config", "torch's pipelining needs the number of micro-batches", _EXAMPLE)]
        return [*untrained_places(mesh, tree), *_wrong_schedule(mesh, tree, pipeline, config)]

    def groups(self, mesh: Mesh) -> tuple[tuple[MeshAxis, ...], ...]:
        return tuple((mesh_axis,) for mesh_axis in ("pipe", *SPLIT_AXES) if mesh.num(mesh_axis) > 1)

    def wrong_numbers(self, config: Mapping[str, Any]) -> Iterable[Problem]:
        return _wrong_num(config) if "num_microbatches" in config else ()

    def training(self, plan: Plan) -> Training:
        facts = Training(num_microbatches(plan), named_optimizer(plan.config))
        if plan.mesh.data == 1 or plan.pipeline is not None:
            return facts
        return evolve(facts, without_gradient="DistributedDataParallel waits for it, and the second step fails")

    def in_flight(self, plan: Plan, stage: int) -> int:
        return in_flight(plan, stage)

    def state(self, plan: Plan, coordinate: Coordinate, alike: range | None = None) -> State:
        return torch_state(plan, coordinate)

    def messages(self, plan: Plan, coordinate: Coordinate) -> Iterable[Messages]:
        return torch_messages(plan, coordinate)

    def findings(self, plan: Plan) -> Iterable[Finding]:
        return ()

    def check_installed(self) -> list[Problem]:
        return []

    def check_loss(self, plan: Plan, loss_fn: Callable[..., Any] | None) -> list[Problem]:
        if not plan.pipeline:
            return [Problem("loss_fn", "it is for a pipeline, and this plan has one stage", "Compute the loss yourself")]
        if loss_fn is None:
            cause = "a pipeline computes the loss on its last stage, and there is no function for it"
            return [Problem("loss_fn", cause, "execute(plan, loss_fn=lambda output, target: ...)")]
        return []

    def wrap(self, handover: Handover) -> Wrapped:
        from .wrap import wrap

        return wrap(handover)

    def holding(self) -> Holding:
        return Holding()


def _wrong_num(config: Mapping[str, Any]) -> list[Problem]:
    num = config.get("num_microbatches")
    if isinstance(num, int) and not isinstance(num, bool) and num > 0:
        return []
    return [Problem("config.num_microbatches", f"it is a positive integer, not {num!r}", _EXAMPLE)]


def _wrong_schedule(mesh: Mesh, tree: SpecTree, pipeline: Pipeline, config: Mapping[str, Any]) -> Iterator[Problem]:
    schedule, num = config.get("schedule", "1f1b"), config.get("num_microbatches", 0)
    num_stages = len(pipeline.stages)
    if schedule not in get_args(PipelineSchedule):
        yield Problem("config.schedule", f"{schedule!r} is unknown", f"There are {', '.join(get_args(PipelineSchedule))}")
        return
    if wrong := _wrong_num(config):
        yield from wrong
        return
    if schedule == "1f1b" and num < num_stages:
        cause = f"1f1b keeps {num_stages} stages busy with as many micro-batches, and there are {num}"
        yield Problem("config.num_microbatches", cause, f'Write {num_stages} or more, or "schedule": "gpipe"')
    yield from _unknown_sizes(pipeline)
    if schedule != "interleaved_1f1b":
        yield from one_stage_per_place(mesh, pipeline)
        return
    if num_stages % mesh.pipe or num_stages == mesh.pipe:
        cause = (
            f"the model is cut into {num_stages} stages, and interleaved_1f1b puts 2 or more at each of {mesh.pipe} places"
        )
        yield Problem("", cause, f"Cut it into {2 * mesh.pipe} stages: sch.cut_evenly({2 * mesh.pipe})")
    rounds = max(1, num // mesh.pipe)
    if num % rounds:
        cause = f"interleaved_1f1b runs {num} micro-batches in {rounds} rounds, which does not divide"
        yield Problem("config.num_microbatches", cause, f"Write {rounds * mesh.pipe}")
    for spec in tree.values() if mesh.data > 1 else ():
        if spec.requires_grad and spec.kind == "parameter" and len(spec.places(mesh)) <= len(spec.also_on):
            held = ", ".join(map(str, (spec.stage, *spec.also_on)))
            cause = f"stages {held} hold it, two of them at one place, and two DDP modules there would average it twice"
            yield Problem(spec.path, cause, "Mesh(data=1), or another number of stages", spec.type)


def _unknown_sizes(pipeline: Pipeline) -> Iterator[Problem]:
    """Iterate over tensors that cross with sizes that the next stage cannot compute before they come."""
    example = {size.name: size.example for size in pipeline.sizes}
    for number, stage in enumerate(pipeline.stages[:-1]):
        for output in stage.outputs:
            try:
                output.shape_in(example)
            except ValueError as error:
                cause = f"stage {number} gives {output}, whose sizes the next stage has to know before it comes: {error}"
                yield Problem("", cause, "Cut another module, or target='deepspeed', which sends the sizes")
