"""From a schedule to a plan: on a laptop, for any number of ranks, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve

from ..specs.checkpoint import Checkpoint
from ..specs.equality import Unfollowed
from ..specs.errors import PlanError, Problem
from ..specs.plan import Plan, misfits
from ..specs.source import ModuleValues, OwnValues, Uninitialised, Unknown
from ..specs.steps import Agree, MakeOptimizer, Step, TakeStages, Wrap
from .checkpoints.sources import checkpoint_sources
from .dialects import find_dialect
from .init.units import Unit, find_units
from .layout.forward.microbatch import follow_microbatch
from .layout.local_model import LocalModel
from .model.callables import register
from .pipeline.plan_stages import cut_model, is_cut, on_their_stages, tied_across, wrong_for_stages, wrong_stages
from .planning.arguments import wrong_arguments, wrong_scripted
from .planning.group_steps import group_steps
from .planning.layout_steps import layout_steps
from .planning.proof_inputs import proof_inputs
from .planning.value_steps import Strategy, value_steps
from .schedule import Schedule
from .types.check import Checked, check_types
from .types.evidence import evidence
from .types.mends import Mend, mended
from .types.tape import Tape

if TYPE_CHECKING:
    from torch import Tensor

    from ..specs.param import ParamSpec
    from ..specs.stored import Folder
    from .pipeline.partition import Partition
    from .planning.group_steps import MeshAxes


def plan_build(
    sch: Schedule,
    *,
    target: str | None = None,
    init_weights: bool | Checkpoint | Callable[..., object] = True,
    strategy: Literal["auto"] | Strategy = "auto",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Plan the tensors and the steps of every rank, without touching devices, process groups, generators or the model.

    Args:
        sch: The declared schedule.
        target: Runtime that takes the module, by the name of its dialect; None for none.
        init_weights: True for the model's own init code; a function ``(module)`` or ``(module, path)`` that is called for
            each module that holds tensors; a ``Checkpoint``, of whose files only the headers are read now; False to leave
            tensors on meta without values, and send nothing.
        strategy: ``local`` (each rank evaluates the init programs of its own parts; only tensors without a
            program are scattered), ``scatter`` (the first rank makes a tensor and sends each rank its part), ``broadcast``
            (it sends all ranks the whole, which they slice), or ``auto``, which is ``local``. The values are the same.
        seed: The seed of all random numbers.
        config: The target's configuration: plain JSON values.
        example_inputs: Tensors by the names of the model's arguments, also on the meta device; with them the model is
            followed on fake tensors, whole and as a rank has it, and activations and gradients that differ are found. A
            model with stages is exported with them; the first stage takes them in this order. Left out, a split model of
            transformers is followed with inputs made from its configuration, for the proof alone.

    Raises:
        PlanError: With everything that is wrong, at once.

    >>> import torch
    >>> from torch import nn
    >>> from shardplan.specs import Mesh
    >>> from shardplan.functional import create_schedule
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> plan = plan_build(create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise())
    >>> plan.tree["0.weight"].local_shape(plan.mesh.coordinate(1))
    (16, 8)
    """
    if not isinstance(sch, Schedule):
        msg = f"plan_build takes a schedule, not a {type(sch).__name__}: plan_build(create_schedule(model, mesh))"
        raise TypeError(msg)

    return _planned(sch, target, init_weights, strategy, seed, config, example_inputs)


def plan_to_judge(sch: Schedule, example_inputs: Mapping[str, Any] | None) -> Plan:
    """Plan a schedule of a model with values as ``plan_build`` does, but do not look for mends of what is wrong.

    Raises:
        PlanError: With everything that is wrong, at once.
    """
    return _planned(sch, init_weights=False, example_inputs=example_inputs, has_mends=False)


def _planned(  # noqa: PLR0917  as plan_build has them
    sch: Schedule,
    target: str | None = None,
    init_weights: bool | Checkpoint | Callable[..., object] = True,  # noqa: FBT001, FBT002  as above
    strategy: Literal["auto"] | Strategy = "auto",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    has_mends: bool = True,
) -> Plan:
    # arguments
    problems = [*sch.problems, *misfits(sch.mesh, sch.tree), *wrong_arguments(strategy, seed, init_weights, config)]
    problems += wrong_scripted(sch.runtime.model, sch.tree)

    # sources of all values
    subject, init_code = _subject(sch, init_weights, example_inputs)
    units, folder = [], None
    if not problems:
        subject, units, folder, problems = _with_sources(subject, init_weights, init_code)

    # layout
    layout, wrong_layout = layout_steps(subject, sch.layout)
    subject = evolve(subject, layout=layout)

    # checks: of the target, of the stages, of a forward pass
    dialect, unknown_target = find_dialect(target)
    problems += [*wrong_layout, *unknown_target]
    if dialect is not None:
        problems += dialect.check(sch.mesh, subject.tree, layout, config)
    problems += wrong_stages(sch, example_inputs)
    problems = problems or _wrong_for_stages(sch, subject)
    checked = None if problems else _checked(sch, subject, has_mends=has_mends)
    problems += checked.problems if checked else ()
    if problems or dialect is None:
        raise PlanError(problems)

    # stages
    subject, partition = _cut(sch, subject)
    pipeline = partition.pipeline if partition else None
    if problems := dialect.check_pipeline(sch.mesh, subject.tree, pipeline, config):
        raise PlanError(problems)

    # steps
    dedupe = isinstance(init_weights, Checkpoint) and init_weights.dedupe
    values = value_steps(sch.mesh, subject.tree, units, "local" if strategy == "auto" else strategy, dedupe=dedupe)
    return Plan(
        mesh=sch.mesh,
        tree=subject.tree,
        steps=_steps(subject, list(values), dialect.groups(sch.mesh), target, has_stages=partition is not None),
        target=target,
        config=config,
        seed=seed,
        pipeline=pipeline,
        folder=folder,
        silences=sch.silences,
        trusts=sch.trusts,
        runtime=evolve(sch.runtime, callables=subject.callables, partition=partition),
        microbatch=None if example_inputs is None else follow_microbatch(subject),
        equality=evidence(checked, subject, sch.trusts, "made" if example_inputs is None else "given") if checked else None,
    )


def _checked(sch: Schedule, subject: LocalModel, *, has_mends: bool) -> Checked | None:
    """Follow the split model, and try mends of what is wrong; None if there are no inputs."""
    given = _with_inputs(sch, subject)
    if not isinstance(given, LocalModel):
        return given and Checked((), (given,))
    found = check_types(given, sch.trusts, sch.handed)
    return evolve(found, problems=_with_mends(sch, given, found)) if found.problems and has_mends else found


def _with_inputs(sch: Schedule, subject: LocalModel) -> LocalModel | Unfollowed | None:
    """Return the model with inputs to follow it with: given, or made from its configuration where anything is split.

    None if there are no inputs, and nobody would expect any; why there are none, if they could not be made.
    """
    if subject.example_inputs is not None:
        return subject
    if max(sch.mesh.tensor, sch.mesh.expert) == 1 or is_cut(sch) or getattr(subject.model, "config", None) is None:
        return None
    made = proof_inputs(subject)
    return made if isinstance(made, Unfollowed) else evolve(subject, example_inputs=made)


def _with_mends(sch: Schedule, subject: LocalModel, checked: Checked) -> Sequence[Problem]:
    """Return the problems of a split model, with mends that were tried."""
    wholes: list[Tape] = []

    def attempt(mends: Sequence[Mend]) -> Checked | None:
        left_out = {step for mend in mends for step in mend.without}
        changed = evolve(sch, layout=tuple(step for step in sch.layout if step not in left_out))
        for call in (call for mend in mends for call in mend.calls):
            changed = getattr(changed.at[call.path], call.verb)(*call.args, **dict(call.options))
        layout, problems = layout_steps(subject, changed.layout)
        if problems or changed.problems:
            return None
        return check_types(evolve(subject, layout=layout), sch.trusts, sch.handed, wholes=wholes)

    return mended(checked.problems, subject, attempt)


def plan_unchecked(sch: Schedule, example_inputs: Mapping[str, Any] | None) -> Plan:
    """Plan a schedule of a model with values, without the checks that would refuse it: ``verify`` measures what they claim.

    Raises:
        PlanError: If the schedule cannot be laid out at all.
    """
    if problems := [*sch.problems, *misfits(sch.mesh, sch.tree), *wrong_stages(sch, example_inputs)]:
        raise PlanError(problems)
    subject, _ = _subject(sch, init_weights=False, example_inputs=example_inputs)
    layout, _ = layout_steps(subject, sch.layout)
    subject, partition = _cut(sch, evolve(subject, layout=layout))
    values = list(value_steps(sch.mesh, subject.tree, (), "local", dedupe=False))
    return Plan(
        mesh=sch.mesh,
        tree=subject.tree,
        steps=_steps(subject, values, (), None, has_stages=partition is not None),
        pipeline=partition.pipeline if partition else None,
        runtime=evolve(sch.runtime, callables=subject.callables, partition=partition),
    )


def _cut(sch: Schedule, subject: LocalModel) -> tuple[LocalModel, Partition | None]:
    """Return the model with its tensors on their stages, and the graphs of the stages, if it is cut."""
    if not is_cut(sch):
        return subject, None
    partition = cut_model(sch, subject)
    return evolve(subject, tree=on_their_stages(subject.tree, partition)), partition


def _subject(
    sch: Schedule, init_weights: object, example_inputs: Mapping[str, Tensor] | None
) -> tuple[LocalModel, str | None]:
    """Return the model that is planned, its layout still to come, and the name of the user's init code, if any."""
    init_code, callables = (
        register(sch.runtime.callables, init_weights) if callable(init_weights) else (None, sch.runtime.callables)
    )
    tree = sch.tree.map(_without_elements if init_weights else _without_init)
    return LocalModel(sch.runtime.model, sch.mesh, tree, (), callables, example_inputs, sch.leaves), init_code


def _without_elements(spec: ParamSpec) -> ParamSpec:
    """Return a tensor as it is, unless it has no elements and so no values to make or send."""
    return spec if spec.num_elements else _without_init(spec)


def _without_init(spec: ParamSpec) -> ParamSpec:
    """Return a tensor with the values that each rank's module has; without values where it has none."""
    match spec.source:
        case Unknown():
            return evolve(spec, source=Uninitialised())
        case ModuleValues():
            return evolve(spec, source=OwnValues())
        case _:
            return spec


def _with_sources(
    subject: LocalModel, init_weights: object, init_code: str | None
) -> tuple[LocalModel, list[Unit], Folder | None, list[Problem]]:
    """Return the model with the sources of all values, its runs of init code, the folder that is read, and problems."""
    tree, folder = subject.tree, None
    if isinstance(init_weights, Checkpoint):
        tree, folder, problems = checkpoint_sources(subject.model, tree, init_weights)
        if problems:
            return evolve(subject, tree=tree), [], folder, problems
    units, sources, problems = find_units(subject.model, tree, subject.callables, init_code)
    tree = tree.map(lambda spec: evolve(spec, source=sources.get(spec.path, spec.source)))
    return evolve(subject, tree=tree), units, folder, problems


def _wrong_for_stages(sch: Schedule, subject: LocalModel) -> list[Problem]:
    """Return problems of an export into stages."""
    return list(wrong_for_stages(subject)) if is_cut(sch) and not sch.handed else []


def _steps(
    subject: LocalModel, values: Sequence[Step], groups: Sequence[MeshAxes], target: str | None, *, has_stages: bool
) -> Iterator[Step]:
    """Iterate over the steps of a plan, in the order in which every rank follows them."""
    tied = tied_across(subject.mesh, subject.tree)
    yield Agree("opening")
    yield from group_steps(values, subject.layout, tied, groups)
    yield from values
    yield from subject.layout
    if has_stages:
        yield TakeStages()
    yield from tied
    yield MakeOptimizer()
    yield Agree("closing")
    yield Wrap(target)
