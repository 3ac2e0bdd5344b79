"""The laws of a plan, proven for all its ranks from the traces of its distinct coordinates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from ...specs.equality import Unfollowed
from ...specs.layout_steps import LayoutStep, SetAttributes, SetToLocalSize, SumGradient
from ...specs.mesh import MESH_AXES, STAGE_AXES, Coordinate, Mesh
from ...specs.paths import join
from ...specs.proof import Failure, Law, Proof
from ...specs.source import Loaded, Made, Materialised, ModuleValues, OwnValues, Uninitialised, Unknown
from ...specs.steps import MakeOptimizer, SumTied, TakeStages, Wrap
from ..planning.shared_gradients import shared_gradients

if TYPE_CHECKING:
    from ...specs.distinct_ranks import Distinct
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.shard import Shard
    from .contents_trace import Content, JoinedCollective, Origin, Trace, Traces


def prove(plan: Plan, distinct: Distinct, traces: Traces) -> tuple[Proof, ...]:
    """Return a proof of each law: the cases that were checked, and the failures.

    The interpreter itself follows the steps at each distinct coordinate; the entries of a split axis are checked at every
    place along its mesh axis. The order of collectives is proven for the execution alone: while training, the model's code
    issues them in its own order, and their groups are checked to exist. Whether the split model computes what the whole one
    does is not found here: the plan has evidence of it, or none.

    Args:
        plan: The plan.
        distinct: Which ranks are alike.
        traces: A trace for each distinct coordinate: ``trace(plan, distinct)``.

    >>> from shardplan.specs import Distinct, Mesh, ParamSpec, Plan, SpecTree
    >>> from shardplan.specs.steps import Allocate, Place
    >>> from shardplan.functional.auditing.contents_trace import trace
    >>> tree = SpecTree([ParamSpec("weight", (4, 4), "float32")])
    >>> plan = Plan(Mesh(data=64), tree, [Allocate(0, ("weight",))])  # nothing places it
    >>> distinct = Distinct.of(plan.mesh, plan.tree)
    >>> print(prove(plan, distinct, trace(plan, distinct))[0].failures[0].cause)
    Coordinate(pipe=0, data=0, tensor=0) never gets it
    """
    num_tensors = len(plan.tree)
    num_joined = sum(len(trace.collectives) for trace in traces.values())
    ties = [spec for spec in plan.tree.values() if spec.tie or len(spec.places(plan.mesh)) > 1]
    found: list[tuple[Law, int, Iterable[Failure]]] = [
        ("cover", num_tensors, _cover(plan, traces)),
        ("source", num_tensors, _source(plan, traces)),
        ("ties", len(ties), _ties(plan, ties, traces)),
        ("once", _num_once(plan), _once(plan)),
        ("stages", num_tensors, _stages(plan, traces)),
        ("order", num_joined, _order(plan, distinct, traces)),
        ("values", num_tensors, _values(plan)),
    ]
    return (*(Proof(law, num, tuple(dict.fromkeys(failures))) for law, num, failures in found), _equal(plan))


def _cover(plan: Plan, traces: Traces) -> Iterator[Failure]:
    """Each coordinate of a tensor's stages places its shard exactly once, and the shards tile the tensor."""
    for spec in plan.tree.values():
        for shard in spec.shards:
            if cause := _gap(shard, spec.orig_shape[shard.axis], plan.mesh):
                yield Failure(spec.path, cause)
    for here, trace in traces.items():
        for path, cause in trace.wrong:
            yield Failure(path, f"{here}: {cause}")
        for spec in plan.tree.values():
            if here.pipe not in spec.places(plan.mesh):
                continue
            placed = trace.placed.get(spec.path, [])
            if len(placed) != 1:
                yield Failure(spec.path, f"{here} {'gets it more than once' if placed else 'never gets it'}")
            elif cause := _other_part(spec, here, placed[0]):
                yield Failure(spec.path, f"{here} {cause}")


def _other_part(spec: ParamSpec, here: Coordinate, contents: tuple[Content, ...]) -> str:
    if not contents or [(content.path, content.index) for content in contents] == [(spec.path, spec.index(here))]:
        return ""  # a tensor without contents has no values: the law of sources reports that
    return f"holds {' and '.join(f'{c.path} {c.index}' for c in contents)}, and its part is {spec.index(here)}"


@cache
def _gap(shard: Shard, size: int, mesh: Mesh) -> str:
    """Describe the first entries of an axis that no place holds, or that several places hold; ``""`` if there are none."""
    parts = sorted(
        (held.start, held.stop)
        for place in range(mesh.num(shard.mesh_axis))
        for held in shard.held(size, mesh.at(**{shard.mesh_axis: place}))
        if held.holder == 0
    )
    reached = 0
    for start, stop in parts:
        if start != reached:
            what = "nobody holds" if start > reached else "several places hold"
            return f"{what} entries {min(start, reached)} to {max(start, reached)} of axis {shard.axis}"
        reached = stop
    return "" if reached == size else f"nobody holds entries {reached} to {size} of axis {shard.axis}"


def _source(plan: Plan, traces: Traces) -> Iterator[Failure]:
    """A tensor's values come from the source of its spec, and from a single rank unless every rank computes the same."""
    makers: dict[str, dict[Origin, list[Coordinate]]] = {}
    filled = {path for trace in traces.values() for path, placed in trace.placed.items() if any(placed)}
    for here, trace in traces.items():
        for content in trace.made:
            makers.setdefault(content.path, {}).setdefault(content.origin, []).append(here)
    for spec in plan.tree.values():
        for cause in _wrong_source(spec, makers.get(spec.path, {}), is_filled=spec.path in filled):
            yield Failure(spec.path, cause)


def _wrong_source(spec: ParamSpec, found: dict[Origin, list[Coordinate]], *, is_filled: bool) -> Iterator[str]:
    planned = _planned(spec)
    if planned == "nothing":
        if found or is_filled:
            yield f"its spec says {spec.source}, and a step gives it values"
        return
    if not found:
        whence = "it is sent, and no rank has made it"
        yield whence if is_filled else f"it is to be {spec.source}, and no step gives it values"
    for origin, places in found.items():
        if origin != planned:
            yield f"its spec says {spec.source}, and {places[0]} has it from another source: {origin}"
        elif len(set(places)) < len(places):
            yield f"{next(place for place in places if places.count(place) > 1)} makes it twice"
        elif origin in ("code", "module") and (len(places) > 1 or not places[0].is_first(*STAGE_AXES)):
            yield f"{' and '.join(map(str, places))} make it, each in its own way"


def _planned(spec: ParamSpec) -> Origin:
    match spec.source:
        case Made():
            return "code"
        case ModuleValues():
            return "module"
        case OwnValues():
            return "own"
        case Loaded() | Materialised():
            return "file"
        case Uninitialised() | Unknown():
            return "nothing"
        case _:
            return "program"


def _ties(plan: Plan, ties: list[ParamSpec], traces: Traces) -> Iterator[Failure]:
    """All paths of a tensor are one object on every rank, and stages that share it sum its gradient."""
    for spec in ties:
        places = spec.places(plan.mesh)
        for here, trace in traces.items():
            if here.pipe not in places:
                continue
            missing = set(spec.tie) - set(trace.aliases.get(spec.path, ()))
            if missing:
                yield Failure(spec.path, f"{here} has other tensors at {', '.join(sorted(missing))}")
            is_trained = spec.kind == "parameter" and spec.requires_grad
            if is_trained and len(places) > 1 and trace.summed.get(spec.path) != places:
                yield Failure(spec.path, f"{here} does not sum its gradient over places {places} along 'pipe'")


def _num_once(plan: Plan) -> int:
    """Return the number of sums of gradients, plus one for the handover."""
    return 1 + len(list(shared_gradients(plan.mesh, plan.tree))) + sum(isinstance(step, SumTied) for step in plan.steps)


def _once(plan: Plan) -> Iterator[Failure]:
    """Each shared gradient is summed exactly once, and the module is handed over exactly once.

    A tensor that is split over ``expert`` or has repeated granules needs one ``SumGradient`` for each use, with the mesh
    axis, the neighbours and the divisor that its split asks for. Other sums are part of the modules' computation, which the
    schedule declares and a plan cannot check.
    """
    sums: dict[tuple[str, str, str], list[SumGradient]] = {}
    for step in plan.steps:
        if isinstance(step, SumGradient):
            sums.setdefault((step.module, step.name, step.mesh_axis), []).append(step)
    for wanted in shared_gradients(plan.mesh, plan.tree):
        found = sums.get((wanted.module, wanted.name, wanted.mesh_axis), [])
        if found != [wanted]:
            yield Failure(join(wanted.module, wanted.name), f"{_found(found)}, and its split asks for one: {wanted}")
    tied = Counter(step.path for step in plan.steps if isinstance(step, SumTied))
    for path, num in tied.items():
        if num > 1:
            yield Failure(path, f"its gradient is summed along 'pipe' {num} times")
    yield from _handover(plan)


def _found(sums: list[SumGradient]) -> str:
    match sums:
        case []:
            return "no step sums its gradient"
        case [other]:
            return f"a step sums its gradient otherwise: {other}"
        case _:
            return f"{len(sums)} steps sum its gradient"


def _handover(plan: Plan) -> Iterator[Failure]:
    """The module's stages are taken, its optimizer made, and the module handed to the target."""
    targets = [step.target for step in plan.steps if isinstance(step, Wrap)]
    if len(targets) != 1:
        yield Failure("", f"{len(targets) or 'no'} steps hand the module to its target (Wrap), and one must")
    elif targets != [plan.target]:
        yield Failure("", f"its target is {plan.target}, and the module is handed to {targets[0]}")
    num_optimizers = sum(isinstance(step, MakeOptimizer) for step in plan.steps)
    if num_optimizers > 1:
        yield Failure("", f"{num_optimizers} steps make an optimizer (MakeOptimizer), and one at most may")
    num_taken, is_cut = sum(isinstance(step, TakeStages) for step in plan.steps), plan.pipeline is not None
    if num_taken != is_cut:
        whole = "has stages, and one must" if is_cut else "is not cut, and none may"
        yield Failure("", f"{num_taken or 'no'} steps keep the stages of a rank (TakeStages): the model {whole}")


def _stages(plan: Plan, traces: Traces) -> Iterator[Failure]:
    """A rank makes, receives and places only tensors of its stages."""
    places = {spec.path: spec.places(plan.mesh) for spec in plan.tree.values()}
    for here, trace in traces.items():
        touched = {content.path for content in trace.made} | set(trace.placed)
        touched |= {path for joined in trace.collectives for path, _ in joined.broadcast}
        for path in sorted(path for path in touched if here.pipe not in places[path]):
            yield Failure(path, f"{here} touches it, and it belongs to {_places(places[path])} along 'pipe'")


def _places(places: tuple[int, ...]) -> str:
    return f"place{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"


def _order(plan: Plan, distinct: Distinct, traces: Traces) -> Iterator[Failure]:
    """All members of a group join the same collective at the same step, and the group exists."""
    by_step = {here: {joined.step: joined for joined in trace.collectives} for here, trace in traces.items()}
    for here, trace in traces.items():
        for joined in trace.collectives:
            wanted = joined.between or joined.mesh_axes
            if wanted and wanted not in trace.groups:
                yield Failure(
                    _first_path(joined), f"{here}: no step makes the group along {wanted} that {_named(plan, joined)} needs"
                )
            for member in _members(distinct, here, joined):
                other = by_step[member].get(joined.step)
                if other is None:
                    yield Failure(
                        _first_path(joined), f"{here} waits in {_named(plan, joined)} for {member}, which never comes"
                    )
                elif other != joined:
                    yield Failure(_first_path(joined), f"{here} and {member} do not agree on {_named(plan, joined)}")
        yield from _without_groups(plan, here, trace)


def _without_groups(plan: Plan, here: Coordinate, trace: Trace) -> Iterator[Failure]:
    """Iterate over synchronisations of training whose group no step makes."""
    for mesh_axes, path in _synchronised(plan):
        if mesh_axes not in trace.groups:
            yield Failure(path, f"{here}: no step makes the group along {mesh_axes} that its synchronisation needs")
    for path, between in trace.summed.items():
        if between not in trace.groups:
            cause = f"{here}: no step makes the group of places {between} that the sum of its gradient needs"
            yield Failure(path, cause)


def _members(distinct: Distinct, here: Coordinate, joined: JoinedCollective) -> Iterator[Coordinate]:
    """Iterate over the distinct coordinates in a collective's group."""
    for member in distinct.along(here, joined.mesh_axes or MESH_AXES):
        if not joined.between or member.pipe in joined.between:
            yield member


def _first_path(joined: JoinedCollective) -> str:
    return joined.broadcast[0][0] if joined.broadcast else ""


def _named(plan: Plan, joined: JoinedCollective) -> str:
    over = " x ".join(joined.mesh_axes) or "all ranks"
    return f"the {joined.op} over {over} of step {joined.step} ({type(plan.steps[joined.step]).__name__})"


def _synchronised(plan: Plan) -> Iterator[tuple[tuple[str, ...], str]]:
    """Iterate over the groups along which modules communicate while training, and the first module that needs each."""
    needed: dict[tuple[str, ...], str] = {}
    for step in plan.steps:
        if isinstance(step, LayoutStep):
            for group in (*step.groups(), *((mesh_axis, str(num)) for mesh_axis, num in step.neighbours())):
                needed.setdefault(group, step.module)
    yield from needed.items()


def _values(plan: Plan) -> Iterator[Failure]:
    """No value depends on the layout: ranks' own values and uninitialised memory do."""
    for spec in plan.tree.values():
        match spec.source:
            case OwnValues():
                yield Failure(spec.path, "each rank keeps the values that its own module has")
            case Uninitialised() if spec.num_elements:
                yield Failure(spec.path, "it has no values: whatever the memory holds")
            case _:
                pass


def _equal(plan: Plan) -> Proof:
    """The split model computes what the whole one does: by the plan's evidence, or as nothing is split."""
    found = plan.equality
    if found is None:
        return Proof("equal", 0, unfollowed=tuple(_unfollowed(plan)))
    if found.layout != plan.layout_digest:
        cause = "the plan has another layout than the one that was followed: plan again with plan_build"
        return Proof("equal", 0, unfollowed=(Unfollowed("", "", cause),))
    remark = "inputs made from the configuration" if found.inputs == "made" else ""
    return Proof("equal", len(found.calls), unfollowed=found.unfollowed, remark=remark)


def _unfollowed(plan: Plan) -> Iterator[Unfollowed]:
    """Iterate over what makes a split model another one than the whole, if no inputs were followed: nothing on one rank."""
    first = plan.mesh.coordinate(0)
    matter = [step for step in plan.steps if isinstance(step, LayoutStep) and step.matters(plan.mesh)]
    if any(spec.mesh_axes(first) for spec in plan.tree.values()) or any(
        not isinstance(step, (SetAttributes, SetToLocalSize)) for step in matter
    ):
        cause = "no example inputs" if plan.microbatch is None else "its activations were not followed while planning"
        yield Unfollowed("", "", cause)
        return
    for step in matter:
        if isinstance(step, SetAttributes):
            yield Unfollowed(step.module, "", f"no example inputs, and {step.describe()} is set")
