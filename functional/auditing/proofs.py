"""What holds for a plan on all its ranks, read off what the distinct ones do. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from ...specs.mesh import MESH_AXES, STAGE_AXES, Coordinate, Mesh
from ...specs.proof import Failure, Law, Proof
from ...specs.source import Loaded, Made, Materialised, ModuleValues, OwnValues, Uninitialised, Unknown
from ...specs.steps import DispatchTokens, SumGradient, Sync
from .once import not_once, num_once

if TYPE_CHECKING:
    from ...specs.distinct_ranks import Distinct
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.shard import Shard
    from .contents_trace import Call, Content, Origin, Trace, Traces


def prove(plan: Plan, distinct: Distinct, traces: Traces) -> tuple[Proof, ...]:
    """Return each law, and where it fails.

    The steps are followed for the ranks of each distinct coordinate, by the interpreter itself; which entries of an axis
    they hold is looked at for every place along the axis. What is proven of collectives is their order while the plan is
    executed; while training it is the model's code that issues them, in its order, on groups that are seen to be there.

    Args:
        plan: What to prove it of.
        distinct: Which ranks are alike.
        traces: What they do: ``trace(plan, distinct)``.

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
    num_calls = sum(len(trace.calls) for trace in traces.values())
    ties = [spec for spec in plan.tree.values() if spec.tie or len(spec.places(plan.mesh)) > 1]
    found: list[tuple[Law, int, Iterable[Failure]]] = [
        ("cover", num_tensors, _cover(plan, traces)),
        ("source", num_tensors, _source(plan, traces)),
        ("ties", len(ties), _ties(plan, ties, traces)),
        ("once", num_once(plan), not_once(plan)),
        ("stages", num_tensors, _stages(plan, traces)),
        ("order", num_calls, _order(plan, distinct, traces)),
        ("values", num_tensors, _values(plan)),
    ]
    return tuple(Proof(law, num, tuple(dict.fromkeys(failures))) for law, num, failures in found)


def _cover(plan: Plan, traces: Traces) -> Iterator[Failure]:
    """Every coordinate of a tensor's stages gets its part of it, once; the parts tile the tensor."""
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
            installed = trace.installed.get(spec.path, [])
            if len(installed) != 1:
                yield Failure(spec.path, f"{here} {'gets it more than once' if installed else 'never gets it'}")
            elif cause := _other_part(spec, here, installed[0]):
                yield Failure(spec.path, f"{here} {cause}")


def _other_part(spec: ParamSpec, here: Coordinate, contents: tuple[Content, ...]) -> str:
    if not contents or [(content.path, content.index) for content in contents] == [(spec.path, spec.index(here))]:
        return ""  # without contents it has no values, which is another law's business
    return f"holds {' and '.join(f'{c.path} {c.index}' for c in contents)}, and its part is {spec.index(here)}"


@cache
def _gap(shard: Shard, size: int, mesh: Mesh) -> str:
    """Return what is wrong with the parts of an axis: entries that nobody holds, or that are held too often."""
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
    """What a tensor's values come from is what its spec says, at one place only where it is not a pure function."""
    makers: dict[str, dict[Origin, list[Coordinate]]] = {}
    filled = {path for trace in traces.values() for path, installed in trace.installed.items() if any(installed)}
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
    """All paths of a tensor become one object wherever it is held; what several stages hold has one gradient."""
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


def _stages(plan: Plan, traces: Traces) -> Iterator[Failure]:
    """Whatever a rank makes, gets or places belongs to its stage."""
    places = {spec.path: spec.places(plan.mesh) for spec in plan.tree.values()}
    for here, trace in traces.items():
        touched = {content.path for content in trace.made} | set(trace.installed)
        touched |= {path for call in trace.calls for path, _ in call.broadcast}
        for path in sorted(path for path in touched if here.pipe not in places[path]):
            yield Failure(path, f"{here} touches it, and it belongs to {_named(places[path])} along 'pipe'")


def _named(places: tuple[int, ...]) -> str:
    return f"place{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"


def _order(plan: Plan, distinct: Distinct, traces: Traces) -> Iterator[Failure]:
    """Whatever one member of a group issues, all issue, at the same step; and the group is there."""
    by_step = {here: {call.step: call for call in trace.calls} for here, trace in traces.items()}
    for here, trace in traces.items():
        for call in trace.calls:
            wanted = call.between or call.mesh_axes
            if wanted and wanted not in trace.groups:
                yield Failure(_first(call), f"{here}: no step makes the group along {wanted} that {_what(plan, call)} needs")
            for member in _members(distinct, here, call):
                other = by_step[member].get(call.step)
                if other is None:
                    yield Failure(_first(call), f"{here} waits in {_what(plan, call)} for {member}, which never comes")
                elif other != call:
                    yield Failure(_first(call), f"{here} and {member} do not agree on {_what(plan, call)}")
        yield from _without_groups(plan, here, trace)


def _without_groups(plan: Plan, here: Coordinate, trace: Trace) -> Iterator[Failure]:
    """Iterate over what communicates while training along groups that nobody has made."""
    for mesh_axes, path in _synchronised(plan):
        if mesh_axes not in trace.groups:
            yield Failure(path, f"{here}: no step makes the group along {mesh_axes} that its synchronisation needs")
    for path, between in trace.summed.items():
        if between not in trace.groups:
            cause = f"{here}: no step makes the group of places {between} that the sum of its gradient needs"
            yield Failure(path, cause)


def _members(distinct: Distinct, here: Coordinate, call: Call) -> Iterator[Coordinate]:
    """Iterate over the kinds of coordinates that are in a call's group."""
    for member in distinct.along(here, call.mesh_axes or MESH_AXES):
        if not call.between or member.pipe in call.between:
            yield member


def _first(call: Call) -> str:
    return call.broadcast[0][0] if call.broadcast else ""


def _what(plan: Plan, call: Call) -> str:
    over = " x ".join(call.mesh_axes) or "all ranks"
    return f"the {call.op} over {over} of step {call.step} ({type(plan.steps[call.step]).__name__})"


def _synchronised(plan: Plan) -> Iterator[tuple[tuple[str, ...], str]]:
    """Iterate over the groups along which modules communicate while training, and where each is first needed."""
    needed: dict[tuple[str, ...], str] = {}
    for step in plan.steps:
        match step:
            case Sync(op=op, mesh_axis=mesh_axis, module=module) if op != "divide":
                needed.setdefault((mesh_axis,), module)
            case SumGradient(mesh_axis=mesh_axis, module=module, sharing=()):
                needed.setdefault((mesh_axis,), module)
            case SumGradient(mesh_axis=mesh_axis, module=module, sharing=sharing):
                for num in {num for _, num in sharing if num > 1}:
                    needed.setdefault((mesh_axis, str(num)), module)
            case DispatchTokens(module=module):
                needed.setdefault(("expert",), module)
            case _:
                pass
    yield from needed.items()


def _values(plan: Plan) -> Iterator[Failure]:
    """What each rank has of its own depends on who the ranks are."""
    for spec in plan.tree.values():
        match spec.source:
            case OwnValues():
                yield Failure(spec.path, "each rank keeps the values that its own module has")
            case Uninitialised() if spec.num_elements:
                yield Failure(spec.path, "it has no values: whatever the memory holds")
            case _:
                pass
