"""What makes which tensors, found by running all init code once on fake ones: an init program, or code as it is."""

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
from .coverage import num_covered
from .tracer import Traced, Tracer

if TYPE_CHECKING:
    from torch import nn

    from ...specs.tree import SpecTree


@frozen
class Unit:
    """Tensors that are made together, whole, because the same calls touch them and no init program stands for them.

    Args:
        paths: The tensors, in the order of the tree, each under the path at which it is made.
        calls: The calls, in order; the last write wins.
        scratch: Tensors that the calls touch, but whose values come from elsewhere.
    """

    paths: tuple[str, ...]
    calls: tuple[Call, ...]
    scratch: tuple[str, ...]


def find_units(
    model: nn.Module, tree: SpecTree, callables: Mapping[str, Any], init_weights: str | None
) -> tuple[list[Unit], dict[str, Source], list[Problem]]:
    """Return how the tensors without values are made: units in order, the source of each tensor, what is wrong.

    Where all that code does to a tensor is pointwise, its source is an init program; else the code itself, in a unit.

    Code of the user comes before that of an enclosing Hugging Face model, and that before ``reset_parameters`` or
    ``_reset_parameters``; each only for tensors that those before leave unwritten. Within one owner's code children are
    called before parents, as transformers' ``initialize_weights`` does, and the last write wins.

    Args:
        model: The model; it is not run and not changed.
        tree: Its tensors. Those with source ``Unknown`` need code; ``Made`` ones have a call already.
        callables: The user's functions by name.
        init_weights: Name of the user's init code, if any.
    """
    needed = {spec.path for spec in tree.values() if isinstance(spec.source, Unknown)}
    tracer = Tracer(model, tree, callables)
    calls, winner, problems = _winners(model, tree, tracer, init_weights, needed)
    touching: dict[str, list[tuple[Owner, Traced]]] = {}
    for owner, one in calls:
        for path in one.touched:
            touching.setdefault(path, []).append((owner, one))
    makers: dict[str, list[Traced]] = {}
    for path, (wins, place) in winner.items():
        last = OWNERS.index(wins)
        makers[path] = [one for owner, one in touching[path] if one.writes(path, place) and OWNERS.index(owner) <= last]
    overrides, idle = _overrides(tree, tracer)
    makers |= {path: [one] for path, one in overrides.items()}
    problems += idle
    if not problems:  # else the code that failed may be what would have written the rest
        for path in (path for path in tree if path in needed and path not in winner):
            writers = [one for _, one in touching.get(path, []) if one.touched[path].writes]
            problems.append(_nobody(tree, path, writers))
    order = {id(one): place for place, one in enumerate([*(one for _, one in calls), *overrides.values()])}
    programs, causes = _programs(makers)
    programs |= {path: evolve(programs[path], replaces=True) for path in programs.keys() & overrides.keys()}
    opaque = {path: makers[path] for path in causes}
    made = {path: Made(tuple(one.call for one in ones), causes[path]) for path, ones in opaque.items()}
    places = {path: place for path, (_, place) in winner.items()}
    return _units(tree, opaque, places, order), {**programs, **made}, problems


def _winners(
    model: nn.Module, tree: SpecTree, tracer: Tracer, init_weights: str | None, needed: set[str]
) -> tuple[list[tuple[Owner, Traced]], dict[str, tuple[Owner, str]], list[Problem]]:
    """Return all calls in the order in which they would run, and whose code gives each tensor its values, at which path."""
    traced: dict[Owner, list[Traced]] = {}
    winner: dict[str, tuple[Owner, str]] = {}
    problems: list[Problem] = []
    for owner in OWNERS:
        if not needed - winner.keys():
            break
        traced[owner], wrong = tracer.trace(calls_of(model, owner, init_weights))
        problems += wrong
        writers: dict[str, list[Traced]] = {}
        for one in traced[owner]:
            for path in one.touched:
                writers.setdefault(path, []).append(one)
        for path in needed & writers.keys() - winner.keys():
            covered = [place for place in tree[path].paths if _num_covered(tree, path, place, writers[path]) is None]
            if covered:
                winner[path] = owner, covered[0]
    return [(owner, one) for owner in reversed(OWNERS) for one in traced.get(owner, [])], winner, problems


def _num_covered(tree: SpecTree, path: str, place: str, calls: Iterable[Traced]) -> int | None:
    """Return how many elements of a tensor that is made at ``place`` get values; None for all of them."""
    views = [view for one in calls if one.writes(path, place) for view in one.touched[path].overwritten]
    num = num_covered(views, tree[path].num_elements)
    return None if views and num == tree[path].num_elements else num


def _overrides(tree: SpecTree, tracer: Tracer) -> tuple[dict[str, Traced], list[Problem]]:
    """Return the calls of ``.init``, by the path that each gives values, and those that do not."""
    asked = [(spec, spec.source.calls[0]) for spec in tree.values() if isinstance(spec.source, Made)]
    traced, problems = tracer.trace(call for _, call in asked if isinstance(call, TensorCall))
    functions = {one.call.path: one for one in traced if isinstance(one.call, TensorCall)}
    overrides: dict[str, Traced] = {}
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


def _programs(makers: Mapping[str, Sequence[Traced]]) -> tuple[dict[str, InitProgram], dict[str, str]]:
    """Return the init programs of tensors, and for those that have none, why."""
    programs: dict[str, InitProgram] = {}
    causes: dict[str, str] = {}
    for path, ones in makers.items():
        program: InitProgram | None = InitProgram(())
        for touch in (one.touched[path] for one in ones):
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
    found = list(causes)
    while found:  # what they are computed from is made with them
        path = found.pop()
        for other in sorted({other for one in makers[path] for other in one.touched[path].of} & programs.keys()):
            del programs[other]
            causes[other] = f"{path} is computed from it"
            found.append(other)
    return programs, causes


def _nobody(tree: SpecTree, path: str, writers: Sequence[Traced]) -> Problem:
    spec = tree[path]
    if writers:
        num = max(_num_covered(tree, path, place, writers) or 0 for place in spec.paths)
        code = ", ".join(dict.fromkeys(str(one.call) for one in writers))
        cause = f"init code ({code}) gives values to {num} of its {spec.num_elements} elements"
    else:
        cause = "no init code writes it"
    fix = f"Give it values: sch.at[{path!r}].init(function), which writes the tensor in place, or .init(number)"
    if spec.kind != "parameter":
        fix += "; or build its module on the CPU, and its values are kept"
    return Problem(path, cause, fix, spec.type)


def _units(
    tree: SpecTree, makers: Mapping[str, Sequence[Traced]], places: Mapping[str, str], order: Mapping[int, int]
) -> list[Unit]:
    """Join calls that touch a common tensor, and list the tensors of each such unit."""
    calls = {id(one): one for ones in makers.values() for one in ones}
    touches: nx.Graph[int | str] = nx.Graph()
    for key, one in calls.items():
        touches.add_edges_from((key, p) for p in one.touched if p in makers and one.reaches(p, places.get(p, p)))
    rank = {spec.path: number for number, spec in enumerate(tree.values())}
    units: list[Unit] = []
    for members in nx.connected_components(touches):
        ones = [calls[key] for key in sorted((key for key in members if isinstance(key, int)), key=order.__getitem__)]
        paths = sorted((path for path in members if isinstance(path, str)), key=rank.__getitem__)
        others = sorted({path for one in ones for path in one.touched} - makers.keys(), key=rank.__getitem__)
        made_at = tuple(places.get(path, path) for path in paths)
        units.append(Unit(made_at, tuple(one.call for one in ones), tuple(others)))
    return sorted(units, key=lambda unit: rank[tree[unit.paths[0]].path])
