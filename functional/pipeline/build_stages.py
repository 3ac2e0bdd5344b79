"""Build the stages of a plan as modules; for a loaded plan, export the model again and compare the graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ...specs.errors import PlanError, Problem
from ...specs.layout_steps import LayoutStep
from ..layout.apply import RankContext
from ..layout.local_model import LocalModel
from ..model.read import differences, named_tensors
from .example_inputs import read_back
from .partition import Partition, StageCode, export_stages
from .sequential import sequential_stages
from .stage_graph import FUNCTIONS
from .stage_module import StageModule

if TYPE_CHECKING:
    from torch import nn

    from ...specs.plan import Plan


def stage_modules(plan: Plan, model: nn.Module) -> tuple[StageModule, ...]:
    """Return all stages of a plan around the tensors of a model, to be called in sequence in a single process.

    Args:
        plan: A plan whose mesh has several places along ``pipe``, and a single place along ``tensor``.
        model: The planned model, with its values. It is not changed; the stages use its tensors.

    Raises:
        PlanError: If the plan has no stages, splits tensors, or does not match the model.

    >>> import torch
    >>> from torch import nn
    >>> from shardplan.specs import Mesh
    >>> from shardplan.functional import create_schedule, plan_build, stage_modules
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sch = create_schedule(model, Mesh(pipe=2)).at["1"].cut_pipeline_stage()
    >>> first, last = stage_modules(plan_build(sch, example_inputs={"input": torch.ones(3, 4)}), model)
    >>> x = torch.randn(5, 4)
    >>> torch.equal(last(*first(x)), model(x))
    True
    """
    if plan.pipeline is None or plan.mesh.tensor > 1:
        cause = f"all stages stand in one process only where none is split, and the plan is for {plan.mesh}"
        raise PlanError([Problem("", cause, "Plan for a mesh with pipe > 1 and tensor=1")])
    if problems := list(differences(plan, model, with_values=False)):
        raise PlanError(problems)
    rank = RankContext(plan.mesh.coordinate(0), {}, plan.runtime.callables)
    parts = planned_partition(plan, model)
    device = next((tensor.device for _, _, tensor in named_tensors(model) if not tensor.is_meta), torch.device("cpu"))
    return tuple(make_stage(plan, parts, number, model, rank, device) for number in range(len(parts.codes)))


def planned_partition(plan: Plan, model: nn.Module) -> Partition:
    """Return the graphs of a plan's stages: from planning in this process, else exported again and compared with the plan.

    Raises:
        PlanError: If the graphs differ from the planned graphs.
    """
    if plan.runtime.partition is not None and plan.runtime.model is model:
        return plan.runtime.partition
    assert plan.pipeline is not None, "the plan is cut"
    planned = plan.pipeline
    layout = [step for step in plan.steps if isinstance(step, LayoutStep)]
    example_inputs = read_back(planned.example)
    subject = LocalModel(model, plan.mesh, plan.tree, layout, plan.runtime.callables, example_inputs, planned.leaves)
    found = sequential_stages(subject, planned.chain) if planned.chain else export_stages(subject, planned.cuts)
    pairs = zip(found.pipeline.stages, planned.stages, strict=True)
    different = [number for number, (ours, theirs) in enumerate(pairs) if ours.digest != theirs.digest]
    if different:
        cause = f"stage {', '.join(map(str, different))} computes something else than the planned one: its graph differs"
        raise PlanError([Problem("", cause, "Plan again with this model and this version of torch and of the model's code")])
    return found


def make_stage(
    plan: Plan, parts: Partition, number: int, model: nn.Module, rank: RankContext, device: torch.device
) -> StageModule:
    """Return a stage around the tensors of a model."""
    assert plan.pipeline is not None, "the plan is cut"
    paths = list(_paths(plan, parts, number))
    return StageModule(number, plan.pipeline, parts.codes[number], model, paths, rank, device=device)


def _paths(plan: Plan, parts: Partition, number: int) -> Iterator[str]:
    """Iterate over the paths of the tensors that a stage's graphs name; for their owner, also of tensors that none names."""
    everywhere = [set(_named(code)) for code in parts.codes]
    for spec in plan.tree.values():
        if number in (spec.stage, *spec.also_on):
            yield from (path for path in spec.paths if _is_in(path, everywhere[number]))
        if number == spec.stage:
            yield from (path for path in spec.paths if not any(_is_in(path, named) for named in everywhere))


def _named(code: StageCode) -> Iterator[str]:
    """Iterate over the paths of the tensors and leaves that a stage's graphs name."""
    for graph in code.graphs.values():
        for node in graph.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_module" and not str(node.target).startswith(FUNCTIONS)):
                yield str(node.target)


def _is_in(path: str, named: set[str]) -> bool:
    names = path.split(".")
    return any(".".join(names[:depth]) in named for depth in range(1, len(names) + 1))
