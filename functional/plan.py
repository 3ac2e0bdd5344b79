"""From a schedule to a plan: pure, on a laptop, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from attrs import evolve
from torch import nn

from ..specs.checkpoint import Checkpoint
from ..specs.errors import PlanError, Problem
from ..specs.json_values import not_plain
from ..specs.mesh import Mesh, MeshAxis, in_mesh_order
from ..specs.param import ParamSpec
from ..specs.paths import join
from ..specs.plan import Plan, misfits
from ..specs.program import InitProgram
from ..specs.source import Loaded, Made, ModuleValues, OwnValues, Uninitialised, Unknown
from ..specs.steps import (
    AddBiasAfterSync,
    Agree,
    Broadcast,
    CheckLoaded,
    DispatchTokens,
    ForkRng,
    LayoutStep,
    MakeGroups,
    MakeOptimizer,
    MakeTieGroups,
    MaskPadding,
    Scatter,
    SendCopy,
    SetAttributes,
    SetToLocalSize,
    Step,
    SumGradient,
    SumTied,
    Sync,
    TakeStages,
    Tie,
    VocabParallel,
    Wrap,
)
from .dialects import find_dialect
from .init.calls import wrong_signature
from .init.units import Unit, find_units
from .layout.forward.check import check_forward
from .layout.forward.microbatch import follow_microbatch
from .layout.hooks import needed_groups
from .layout.local_model import LocalModel
from .model.callables import register
from .model.linear import has_forward_of_its_own, linear_of
from .pipeline.plan_stages import cut, is_cut, place, tied_across, wrong_for_stages, wrong_stages
from .planning.shared_gradients import shared_gradients
from .planning.value_steps import Strategy, born_sharded, from_files, local_only, route
from .schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from ..specs.pipeline import Pipeline
    from ..specs.stored import Folder
    from ..specs.tree import SpecTree


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
    """Return what every rank will hold and do. Touches no device, no process group, no generator, and not the model.

    Args:
        sch: What is declared.
        target: Runtime that takes the module, by the name of its dialect; None for none.
        init_weights: True for the model's own init code; a function ``(module)`` or ``(module, path)`` that is called for
            each module that holds tensors; a ``Checkpoint`` whose files have them, headers of which are read now; False to
            leave tensors on meta without values, and send nothing.
        strategy: ``local`` (each rank evaluates the init programs of its own parts; only what has none is scattered),
            ``scatter`` (one rank makes a tensor, each gets its part), ``broadcast`` (each gets all and slices), or
            ``auto``, which is ``local``. The values are the same.
        seed: What all random numbers derive from.
        config: The target's configuration: plain JSON values.
        example_inputs: Tensors by the names of the model's arguments, meta ones will do; with them a forward pass at local
            shapes is tried on fake tensors, and gradients that would be partial are found. A model that is cut into stages
            is exported with them; the first stage takes them in this order.

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
    model: nn.Module = sch.runtime.model
    problems = [
        *sch.problems,
        *misfits(sch.mesh, sch.tree),
        *_wrong_arguments(strategy, seed, init_weights, config),
    ]
    problems += _wrong_scripted(model, sch.tree)
    runtime = sch.runtime
    code: str | None = None
    if callable(init_weights):
        code, callables = register(runtime.callables, init_weights)
        runtime = evolve(runtime, callables=callables)
    tree, units, folder = sch.tree.map(_without_elements if init_weights else _without_init), [], None
    if not problems:
        tree, units, folder, problems = _sources(model, tree, init_weights, runtime.callables, code)
    layout, wrong_layout = _layout(model, sch)
    problems += wrong_layout
    dialect, unknown = find_dialect(target)
    problems += unknown
    if dialect is not None:
        problems += dialect.check(sch.mesh, tree, layout, config)
    problems += wrong_stages(sch, example_inputs)
    subject = LocalModel(model, sch.mesh, tree, layout, runtime.callables, example_inputs, sch.leaves)
    if is_cut(sch) and not sch.handed and not problems:
        problems += wrong_for_stages(subject)
    if example_inputs is not None and not problems:
        problems += check_forward(subject)
    if problems or dialect is None:
        raise PlanError(problems)
    pipeline: Pipeline | None = None
    if is_cut(sch) and example_inputs is not None:
        found = cut(sch, subject)
        pipeline, tree, runtime = found.pipeline, place(tree, found), evolve(runtime, partition=found)
    problems += dialect.check_pipeline(sch.mesh, tree, pipeline, config)
    if problems:
        raise PlanError(problems)
    tied = tied_across(sch.mesh, tree)
    dedupe = isinstance(init_weights, Checkpoint) and init_weights.dedupe
    moves = [
        *_moves(sch.mesh, tree, units, "local" if strategy == "auto" else strategy, dedupe=dedupe),
        *([CheckLoaded()] if _has_sums(tree) else []),
        *_ties(sch.mesh, tree),
    ]
    over, sharing = _groups([*moves, *layout], dialect.groups(sch.mesh)), tuple(dict.fromkeys(needed_groups(layout)))
    between = _between([*moves, *tied])
    steps = [
        Agree("opening"),
        *([MakeGroups(over, sharing)] if over or sharing else []),
        *([MakeTieGroups(between)] if between else []),
        *moves,
        *layout,
        *([TakeStages()] if pipeline else []),
        *tied,
        MakeOptimizer(),
        Agree("closing"),
        Wrap(target),
    ]
    return Plan(
        mesh=sch.mesh,
        tree=tree,
        steps=steps,
        target=target,
        config=config,
        seed=seed,
        pipeline=pipeline,
        folder=folder,
        silences=sch.silences,
        runtime=runtime,
        microbatch=None if example_inputs is None else follow_microbatch(evolve(subject, tree=tree)),
    )


def _wrong_arguments(strategy: object, seed: object, init_weights: object, config: object) -> Iterator[Problem]:
    strategies = ("auto", *get_args(Strategy))
    if strategy not in strategies:
        yield Problem("strategy", f"{strategy!r} is unknown", f"There are {', '.join(strategies)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        yield Problem("seed", f"it is an integer, not {seed!r}", "seed=0")
    if not isinstance(init_weights, (bool, Checkpoint)):
        if not callable(init_weights):
            fix = (
                f'init_weights=Checkpoint("{init_weights}")'
                if isinstance(init_weights, (str, Path))
                else "init_weights=True"
            )
            cause = f"it is True, False, a Checkpoint or a function, not {init_weights!r}"
            yield Problem("init_weights", cause, fix)
        elif wrong := wrong_signature(init_weights):
            yield Problem(
                "init_weights", f"it is (module) or (module, path), not {wrong}", "Give the others by functools.partial"
            )
    for path, value in not_plain("config", config):
        cause = f"a plan holds plain, finite JSON values with strings as keys, and this is {value!r}"
        yield Problem(path, cause, "Write its value")


def _wrong_scripted(model: nn.Module, tree: SpecTree) -> Iterator[Problem]:
    scripted = [f"{path}." if path else "" for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    for spec in tree.values():
        if not any(path.startswith(prefix) for path in spec.paths for prefix in scripted):
            continue
        if spec.shards:
            cause = "it belongs to a scripted module, whose code cannot be split"
            yield Problem(spec.path, cause, "Leave it whole", spec.type)
        if isinstance(spec.source, (Unknown, Made, InitProgram)):
            cause = "it belongs to a scripted module, which keeps the values it came with"
            yield Problem(spec.path, cause, "Script the module on the CPU, with its values in place", spec.type)


def _sources(
    model: nn.Module, tree: SpecTree, init_weights: object, callables: Mapping[str, Any], code: str | None
) -> tuple[SpecTree, list[Unit], Folder | None, list[Problem]]:
    """Return the tree with where all values come from, what init code makes, the files that are read, and what is wrong."""
    folder: Folder | None = None
    if isinstance(init_weights, Checkpoint):
        from .checkpoints.sources import checkpoint_sources

        tree, folder, problems = checkpoint_sources(model, tree, init_weights)
        if problems:
            return tree, [], folder, problems
    units, sources, problems = find_units(model, tree, callables, code)
    return tree.map(lambda spec: evolve(spec, source=sources.get(spec.path, spec.source))), units, folder, problems


def _without_elements(spec: ParamSpec) -> ParamSpec:
    """A tensor without elements has no values to make or send."""
    return spec if spec.num_elements else _without_init(spec)


def _without_init(spec: ParamSpec) -> ParamSpec:
    match spec.source:
        case Unknown():
            return evolve(spec, source=Uninitialised())
        case ModuleValues():
            return evolve(spec, source=OwnValues())
        case _:
            return spec


def _layout(model: nn.Module, sch: Schedule) -> tuple[list[LayoutStep], list[Problem]]:
    """Return the changes that matter on this mesh; a bias behind a summed output goes after the sum."""
    steps = [step for step in sch.layout if _matters(step, sch.mesh)]
    problems: list[Problem] = []
    summed = {s.module: s.op for s in steps if isinstance(s, Sync) and s.when == "forward_post" and s.op != "all_gather"}
    problems += _unequal_gathers(sch.mesh, sch.tree, steps)
    shared = list(shared_gradients(sch.mesh, sch.tree))
    for path, op in summed.items():
        module = model.get_submodule(path)
        weight, kind = sch.tree.get(join(path, "weight")), linear_of(module)
        if kind is None or weight is None or getattr(module, "bias", None) is None:
            continue
        shard = weight.on("tensor")
        if shard is not None and shard.axis == kind.in_axis:
            steps.append(AddBiasAfterSync(path))
            if op == "reduce_scatter" and sch.tree[join(path, "bias")].requires_grad:
                shared.append(SumGradient(path, "bias"))
            if has_forward_of_its_own(module):
                cause = (
                    f"its bias belongs after the sum over ranks, and {type(module).__name__} has a forward of its own,"
                    f" so that it would be added {sch.mesh.tensor} times"
                )
                problems.append(Problem(path, cause, "Use a plain nn.Linear, or bias=False", weight.type))
    # last, so that whatever else is done after a module is done with the operator's result
    others = [step for step in steps if not isinstance(step, SumGradient)]
    return [*others, *dict.fromkeys((*(s for s in steps if isinstance(s, SumGradient)), *shared))], problems


def _unequal_gathers(mesh: Mesh, tree: SpecTree, steps: Iterable[LayoutStep]) -> Iterator[Problem]:
    """Iterate over gathers of outputs of which ranks have different numbers, and that are not told how many."""
    gathered = {
        s.module for s in steps if isinstance(s, Sync) and s.op == "all_gather" and s.when == "forward_post" and not s.sizes
    }
    for spec in tree.values():
        uneven = [s for s in spec.shards if s.axis == 0 and not s.is_even(spec.orig_shape[0], mesh)]
        for module in {path.rpartition(".")[0] for path in spec.paths} & gathered if uneven else ():
            cause = "its parts differ in size from rank to rank, and a gather of its module's outputs takes equal ones"
            yield Problem(spec.path, cause, f"sch.at[{module!r}].colwise(gather_output=True, uneven=True)", spec.type)


def _matters(step: LayoutStep, mesh: Mesh) -> bool:
    match step:
        case Sync(mesh_axis=mesh_axis) | SumGradient(mesh_axis=mesh_axis):
            return mesh.num(mesh_axis) > 1
        case VocabParallel() | AddBiasAfterSync() | ForkRng() | MaskPadding():
            return mesh.tensor > 1
        case DispatchTokens():
            return mesh.expert > 1
        case SetAttributes() | SetToLocalSize():
            return True


def _has_sums(tree: SpecTree) -> bool:
    sources = [spec.source for spec in tree.values()]
    return any(part.stored.sum is not None for source in sources if isinstance(source, Loaded) for part in source.parts)


def _moves(mesh: Mesh, tree: SpecTree, units: list[Unit], strategy: Strategy, *, dedupe: bool) -> Iterator[Step]:
    """Iterate over the steps that give the tensors their values, place by place along ``pipe``."""
    order = {path: number for number, path in enumerate(tree)}
    for at in range(mesh.pipe):
        held = [spec for spec in tree.values() if at in spec.places(mesh)]
        owned = {spec.path for spec in held if spec.places(mesh)[0] == at}
        made: list[tuple[Unit | None, tuple[ParamSpec, ...]]] = [
            (unit, own) for unit in units if (own := tuple(tree[path] for path in unit.paths if tree[path].path in owned))
        ]
        made += [(None, (spec,)) for spec in held if isinstance(spec.source, ModuleValues) and spec.path in owned]
        evaluated = [spec for spec in held if isinstance(spec.source, InitProgram)]
        if strategy == "local":
            yield from born_sharded(evaluated, at)
        else:
            made += [(None, (spec,)) for spec in evaluated]
        made.sort(key=lambda item: order[item[1][0].path])
        yield from route(made, mesh, at, "scatter" if strategy == "local" else strategy)
        yield from from_files((s for s in held if isinstance(s.source, Loaded)), mesh, at, dedupe=dedupe)
        yield from local_only((s for s in held if isinstance(s.source, (OwnValues, Uninitialised))), at)


def _ties(mesh: Mesh, tree: SpecTree) -> Iterator[Tie]:
    return (Tie(at, spec.path, spec.tie) for spec in tree.values() if spec.tie for at in spec.places(mesh))


def _between(steps: Iterable[Step]) -> tuple[tuple[int, ...], ...]:
    """Return the sets of places along ``pipe`` that tensors in common join, each once."""
    sets: dict[tuple[int, ...], None] = {}
    for step in steps:
        match step:
            case SendCopy(stage=stage, to=to):
                sets[stage, to] = None
            case SumTied(between=between):
                sets[between] = None
            case _:
                pass
    return tuple(sorted(sets))


def _groups(steps: list[Step], wanted: tuple[tuple[MeshAxis, ...], ...]) -> tuple[tuple[MeshAxis, ...], ...]:
    """Return the sets of mesh axes along which groups are needed, in mesh order, each once."""
    needed = set(wanted)
    for step in steps:
        match step:
            case Scatter(over=over) | Broadcast(over=over):
                needed.add(over)
            case Sync(mesh_axis=mesh_axis) | SumGradient(mesh_axis=mesh_axis, sharing=()):
                needed.add((mesh_axis,))
            case DispatchTokens():
                needed.add(("expert",))
            case MaskPadding() | VocabParallel():
                needed.add(("tensor",))
            case _:
                pass
    return tuple(sorted(needed, key=in_mesh_order))
