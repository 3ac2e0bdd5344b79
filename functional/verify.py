"""``verify``: all ranks of a schedule on this machine, beside the whole model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve

from ..specs.comparison import Comparison, percent
from ..specs.errors import PlanError, Problem
from ..specs.source import ModuleValues
from .judging.compare import Judged, compare
from .judging.exact import LIFTED
from .judging.inputs import inputs_for, inputs_of_places
from .judging.layouts import relative
from .judging.observe import default_loss
from .judging.ranks import run_ranks
from .judging.tensors import norms, present_gradients
from .judging.values import random_copy
from .judging.whole import Job, WholeRuns, run_whole, unjudgeable
from .model.rng_state import own_generators
from .plan import plan_to_judge, plan_unchecked
from .schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ..specs.param import ParamSpec
    from ..specs.plan import Plan

_log = logging.getLogger("shardplan.verify")

TOLERANCE = 1e-7
"""Relative difference up to which values in double precision are equal; sums in another order differ by some 1e-12."""

_LARGEST_TOLERANCE = 0.01
"""A comparison with a larger tolerance would tell nothing."""

_LIMIT = 600.0


def verify(
    sch: Schedule,
    inputs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    steps: int = 1,
    seed: int = 0,
) -> Comparison:
    """Run all ranks of a schedule as threads of this process, beside the whole model, and compare what they compute.

    Args:
        sch: The schedule; its model may be on the meta device, and stays as it is.
        inputs: Tensors and plain values by the names of the model's arguments; the rows of all places along ``data`` lie
            along axis 0. None to make them, for a model that tells what it is called with.
        loss: From the model's output on the rows of one place along ``data`` to a loss; None for a fixed linear function of
            all outputs. With a loss outputs may be split, or summands.
        steps: Number of steps of SGD.
        seed: Seed of values, inputs and masks.

    Raises:
        PlanError: If the schedule cannot be laid out, there are no inputs, or the whole model cannot run on them, has a loss
            or gradients that are not finite, or returns nothing that can be compared.
        TypeError: If it is not given a schedule.
        ValueError: If ``steps`` is less than 1.

    >>> from torch import nn
    >>> from shardplan.specs import Mesh
    >>> from shardplan.functional import create_schedule
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.Softmax(-1), nn.Linear(32, 8))
    >>> sch = create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise()
    >>> verify(sch, {"input": torch.randn(3, 8)}).first.path
    '1'
    """
    if not isinstance(sch, Schedule):
        msg = f"verify takes a schedule, not a {type(sch).__name__}; call create_schedule(model, mesh) first"
        raise TypeError(msg)
    if steps < 1:
        msg = f"steps must be 1 or more, not {steps}"
        raise ValueError(msg)
    if sch.problems:
        raise PlanError(sch.problems)
    given = inputs_for(sch, seed) if inputs is None else inputs
    with _in_double(), own_generators(seed):
        _log.info("values for the whole model")
        whole = random_copy(sch.runtime.model, seed)
        job = Job(inputs_of_places(whole, given, sch.mesh, seed), loss or default_loss, steps, seed)
        _log.info("a plan for %s", sch.mesh)
        plan, refused = _planned(sch, whole, given, job.inputs[0])
        _log.info("the whole model runs")
        expected = _whole_runs(whole, job)
        if problem := unjudgeable(expected, has_loss=loss is not None):
            raise PlanError([problem])
        job = evolve(job, draws=any(run.draws for run in expected.runs))
        tolerance, notes = _tolerance(whole, job, expected)
        if all(gradient is None for run in expected.runs for gradient in run.steps[0].gradients.values()):
            notes = (*notes, "no gradient could be compared: the loss depends on no trained tensor")
        _log.info("%d ranks run", sch.mesh.num_ranks)
        shown = run_ranks(plan, whole, job, limit=_LIMIT)
        judged = compare(plan, expected, shown, tolerance, has_loss=loss is not None)
        if judged.first is not None and plan.pipeline is not None:
            judged = _located(judged, sch, whole, job, expected, tolerance, has_loss=loss is not None)
    return Comparison(
        mesh=sch.mesh,
        tolerance=tolerance,
        differences=judged.differences,
        first=judged.first,
        refused=tuple(refused),
        notes=(*notes, *judged.notes),
        num_tensors=len(plan.tree),
        num_modules=judged.num_modules,
    )


@contextmanager
def _in_double() -> Iterator[None]:
    """Let new tensors be on the CPU in double precision within the block, whatever the caller's own blocks say."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"), torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def _planned(
    sch: Schedule, whole: nn.Module, given: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[Plan, Sequence[Problem]]:
    """Return the plan of the schedule for the model with values, and why ``plan_build`` refuses the schedule, if it does."""
    exact = _exact(sch, whole)
    try:
        return plan_to_judge(exact, inputs), ()
    except PlanError:
        refused = _refused(sch, given)
    try:
        return plan_unchecked(exact, inputs), refused
    except PlanError as error:
        raise PlanError(refused or error.problems) from error  # with the dtypes of the user's model


def _refused(sch: Schedule, given: Mapping[str, Any]) -> Sequence[Problem]:
    try:
        plan_to_judge(sch, given)
    except PlanError as error:
        return error.problems
    return ()


def _located(
    judged: Judged, sch: Schedule, whole: nn.Module, job: Job, expected: WholeRuns, tolerance: float, *, has_loss: bool
) -> Judged:
    """Return a comparison of stages, whose graphs have no modules, with where the difference begins without the cuts."""
    uncut = evolve(_exact(sch, whole), mesh=evolve(sch.mesh, pipe=1), cuts=(), handed=(), even=None)
    plan = plan_unchecked(uncut, job.inputs[0])
    alone = compare(plan, expected, run_ranks(plan, whole, job, limit=_LIMIT), tolerance, has_loss=has_loss)
    assert judged.first is not None, "the caller has asked"
    if alone.first is None:
        return evolve(judged, first=evolve(judged.first, cause=f"{judged.first.cause}; without the cuts nothing differs"))
    return evolve(judged, first=alone.first, num_modules=alone.num_modules)


def _exact(sch: Schedule, whole: nn.Module) -> Schedule:
    """Return the schedule for the model with values in double precision."""
    return evolve(sch, tree=sch.tree.map(_taken), runtime=evolve(sch.runtime, model=whole))


def _taken(spec: ParamSpec) -> ParamSpec:
    """Return a tensor whose values each rank takes from the whole model."""
    dtype = LIFTED.get(getattr(torch, spec.dtype), getattr(torch, spec.dtype))
    return evolve(spec, dtype=str(dtype).removeprefix("torch."), source=ModuleValues())


def _whole_runs(whole: nn.Module, job: Job, *, halves: bool = False) -> WholeRuns:
    """Run the whole model.

    Raises:
        PlanError: If it cannot run on the inputs.
    """
    try:
        return run_whole(whole, job, halves=halves)
    except PlanError:
        raise
    except Exception as error:
        cause = f"the whole model cannot run on them: {type(error).__name__}: {error}"
        takes = inspect.signature(whole.forward)
        raise PlanError([Problem("inputs", cause, f"Its forward takes {takes}: give its arguments by name")]) from error


def _tolerance(whole: nn.Module, job: Job, expected: WholeRuns) -> tuple[float, tuple[str, ...]]:
    """Return the tolerance: that of double precision, or if some operators have less, what another order of sums makes."""
    if not expected.not_lifted:
        return TOLERANCE, ()
    other = _whole_runs(whole, job, halves=True)
    pairs = zip(_numbers(expected), _numbers(other), strict=True)
    noise = max((relative(b, a, norm) for (a, norm), (b, _) in pairs), default=0.0)
    tolerance = max(TOLERANCE, 100 * noise, 10 * max(expected.not_lifted.values()))
    told = f"{', '.join(list(expected.not_lifted)[:3])} compute in lower precision"
    if tolerance > _LARGEST_TOLERANCE:
        cause = f"{told}, and with sums in another order the whole model itself differs by {percent(noise)}"
        raise PlanError([Problem("the model", cause, "Let it compute in float64, or give inputs with which it is steadier")])
    return tolerance, (f"tolerance {tolerance:.0e}: {told}, and sums in another order differ by {noise:.0e}",)


def _numbers(runs: WholeRuns) -> Iterator[tuple[Tensor, float]]:
    """Iterate over outputs and gradients, each with the norm that its differences are measured by."""
    for run in runs.runs:
        for step in run.steps:
            for tensors in (step.outputs or [], present_gradients(step)):
                yield from zip(tensors, norms(tensors), strict=True)
