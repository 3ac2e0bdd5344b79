"""Find the source of each tensor without values by tracing the init code: an init program, or the code itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
from attrs import evolve, frozen

from ...specs.dtypes import human_bytes
from ...specs.errors import Problem
from ...specs.program import InitProgram
from ...specs.source import Call, Made, Source, TensorCall, Unknown
from .calls import OWNERS, Owner, calls_of
from .constant_tape import MAX_CONSTANT_BYTES
from .strided_views import num_covered
from .tracer import TracedCall, Tracer

if TYPE_CHECKING:
    from torch import nn

    from ...specs.tree import SpecTree


@frozen
class Unit:
    """Tensors that are made whole and together, because the same calls touch them and they have no init program.

    Args:
        paths: The tensors, in the order of the tree, each under the path at which it is made.
        calls: The calls, in order; the last write wins.
        scratch: Tensors that the calls touch, but that have values from other sources.
    """

    paths: tuple[str, ...]
    calls: tuple[Call, ...]
    scratch: tuple[str, ...]


def find_units(
    model: nn.Module, tree: SpecTree, callables: Mapping[str, Any], init_weights: str | None
) -> tuple[list[Unit], dict[str, Source], list[Problem]]:
    """Return how the tensors without values are made: units in order, the source of each tensor, and problems.

    A tensor that code writes by pointwise operations alone has an init program as its source; else the code itself, in a
    unit.

    The user's code has precedence over the code of an enclosing Hugging Face model, and that over ``reset_parameters`` or
    ``_reset_parameters``; each only counts for tensors that the code before leaves unwritten. Within the code of an owner
    children are called before parents, as in transformers' ``initialize_weights``, and the last write wins.

    Args:
        model: The model; it is not run and not changed.
        tree: Its tensors. A tensor with source ``Unknown`` needs code; a ``Made`` tensor has a call already.
        callables: The user's functions by name.
        init_weights: Name of the user's init code, if any.
    """
    needed = {spec.path for spec in tree.values() if isinstance(spec.source, Unknown)}
    tracer = Tracer(model, tree, callables)
    calls, winner, problems = _winners(model, tree, tracer, init_weights, needed)
    touching: dict[str, list[tuple[Owner, TracedCall]]] = {}
    for owner, traced in calls:
        for path in traced.touched:
            touching.setdefault(path, []).append((owner, traced))
    makers: dict[str, list[TracedCall]] = {}
    for path, (wins, place) in winner.items():
        last = OWNERS.index(wins)
        makers[path] = [call for owner, call in touching[path] if call.writes(path, place) and OWNERS.index(owner) <= last]
    overrides, idle = _overrides(tree, tracer)
    makers |= {path: [call] for path, call in overrides.items()}
    problems += idle
    if not problems:  # else the code that failed might have written the rest
        for path in (path for path in tree if path in needed and path not in winner):
            writers = [call for _, call in touching.get(path, []) if call.touched[path].writes]
            problems.append(_unwritten(tree, path, writers))
    order = {id(call): place for place, call in enumerate([*(call for _, call in calls), *overrides.values()])}
    programs, causes = _programs(makers)
    programs |= {path: evolve(programs[path], replaces=True) for path in programs.keys() & overrides.keys()}
    opaque = {path: makers[path] for path in causes}
    made = {path: Made(tuple(traced.call for traced in traces), causes[path]) for path, traces in opaque.items()}
    places = {path: place for path, (_, place) in winner.items()}
    return _units(tree, opaque, places, order), {**programs, **made}, problems


def _winners(
    model: nn.Module, tree: SpecTree, tracer: Tracer, init_weights: str | None, needed: set[str]
) -> tuple[list[tuple[Owner, TracedCall]], dict[str, tuple[Owner, str]], list[Problem]]:
    """Return all calls in the order in which they would run, and the winning owner and path of each tensor."""
    traced: dict[Owner, list[TracedCall]] = {}
    winner: dict[str, tuple[Owner, str]] = {}
    problems: list[Problem] = []
    for owner in OWNERS:
        if not needed - winner.keys():
            break
        traced[owner], wrong = tracer.trace(calls_of(model, owner, init_weights))
        problems += wrong
        writers: dict[str, list[TracedCall]] = {}
        for call in traced[owner]:
            for path in call.touched:
                writers.setdefault(path, []).append(call)
        for path in needed & writers.keys() - winner.keys():
            covered = [place for place in tree[path].paths if _num_covered(tree, path, place, writers[path]) is None]
            if covered:
                winner[path] = owner, covered[0]
    return [(owner, call) for owner in reversed(OWNERS) for call in traced.get(owner, [])], winner, problems


def _num_covered(tree: SpecTree, path: str, place: str, calls: Iterable[TracedCall]) -> int | None:
    """Return the number of elements of a tensor made at ``place`` that get values; None for all of them."""
    views = [view for call in calls if call.writes(path, place) for view in call.touched[path].overwritten]
    num = num_covered(views, tree[path].num_elements)
    return None if views and num == tree[path].num_elements else num


def _overrides(tree: SpecTree, tracer: Tracer) -> tuple[dict[str, TracedCall], list[Problem]]:
    """Return the calls of ``.init`` by the path of their tensor, and the problems of calls that leave elements unwritten."""
    asked = [(spec, spec.source.calls[0]) for spec in tree.values() if isinstance(spec.source, Made)]
    calls, problems = tracer.trace(call for _, call in asked if isinstance(call, TensorCall))
    functions = {traced.call.path: traced for traced in calls if isinstance(traced.call, TensorCall)}
    overrides: dict[str, TracedCall] = {}
    for spec, call in asked:
        tried = [functions[spec.path]] if spec.path in functions else []
        num = _num_covered(tree, spec.path, spec.path, tried)
        if num is None:
            overrides[spec.path] = tried[0]
        elif not problems:
            cause = f"its function {call} gives values to {num} of its {spec.num_elements} elements"
            fix = "Write the tensor that it is given, in place: tensor.fill_(1), torch.nn.init.normal_(tensor)"
            problems.append(Problem(spec.path, cause, fix, spec.type))
    return overrides, problems


def _programs(makers: Mapping[str, Sequence[TracedCall]]) -> tuple[dict[str, InitProgram], dict[str, str]]:
    """Return the init programs of tensors, and for each tensor without a program the cause."""
    programs: dict[str, InitProgram] = {}
    causes: dict[str, str] = {}
    for path, calls in makers.items():
        program: InitProgram | None = InitProgram(())
        for touch in (traced.touched[path] for traced in calls):
            if touch.operations is None:
                program, causes[path] = None, touch.cause
                continue
            for operation in touch.operations:
                if operation.overwrites or program is not None:
                    program = (program or InitProgram(())).then(operation)
        taken = sum(constant.num_bytes for constant in program.constants) if program else 0
        if taken > MAX_CONSTANT_BYTES:
            causes[path] = f"it is computed from constants of {human_bytes(taken)}"
        elif program is not None:
            programs[path] = program
            causes.pop(path, None)
    opaque = list(causes)
    while opaque:  # the tensors from which an opaque tensor is computed are made with it
        path = opaque.pop()
        for source in sorted({source for call in makers[path] for source in call.touched[path].of} & programs.keys()):
            del programs[source]
            causes[source] = f"{path} is computed from it"
            opaque.append(source)
    return programs, causes


def _unwritten(tree: SpecTree, path: str, writers: Sequence[TracedCall]) -> Problem:
    spec = tree[path]
    if writers:
        num = max(_num_covered(tree, path, place, writers) or 0 for place in spec.paths)
        code = ", ".join(dict.fromkeys(str(traced.call) for traced in writers))
        cause = f"init code ({code}) gives values to {num} of its {spec.num_elements} elements"
    else:
        cause = "no init code writes it"
    fix = f"Give it values: sch.at[{path!r}].init(function), which writes the tensor in place, or .init(number)"
    if spec.kind != "parameter":
        fix += "; or build its module on the CPU, and its values are kept"
    return Problem(path, cause, fix, spec.type)


def _units(
    tree: SpecTree, makers: Mapping[str, Sequence[TracedCall]], places: Mapping[str, str], order: Mapping[int, int]
) -> list[Unit]:
    """Join calls that touch a common tensor into units, and list the tensors of each unit."""
    calls = {id(traced): traced for traces in makers.values() for traced in traces}
    touches: nx.Graph[int | str] = nx.Graph()
    for key, traced in calls.items():
        touches.add_edges_from((key, p) for p in traced.touched if p in makers and traced.reaches(p, places.get(p, p)))
    rank = {spec.path: number for number, spec in enumerate(tree.values())}
    units: list[Unit] = []
    for members in nx.connected_components(touches):
        traces = [calls[key] for key in sorted((key for key in members if isinstance(key, int)), key=order.__getitem__)]
        paths = sorted((path for path in members if isinstance(path, str)), key=rank.__getitem__)
        scratch = sorted({path for traced in traces for path in traced.touched} - makers.keys(), key=rank.__getitem__)
        made_at = tuple(places.get(path, path) for path in paths)
        units.append(Unit(made_at, tuple(traced.call for traced in traces), tuple(scratch)))
    return sorted(units, key=lambda unit: rank[tree[unit.paths[0]].path])
