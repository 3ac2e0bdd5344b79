"""Which init code makes which tensors: found by running all of it once on fake tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import torch
from attrs import evolve, frozen
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from ..specs.errors import Problem
from ..specs.source import Call, FillCall, Made, ModuleCall, TensorCall, Unknown
from .callables import find
from .generators import own_generators
from .module_copy import copy_module, get_tensor, like, module_of, put_tensor, tied
from .recorder import DependsOnValuesError, Recorder, Touch, num_covered, whole_view
from .skeleton import named_tensors, own_tensors

if TYPE_CHECKING:
    from ..specs.tree import SpecTree

Owner = Literal["user", "transformers", "reset"]
"""Whose init code it is."""

_OWNERS: tuple[Owner, ...] = ("user", "transformers", "reset")  # first come, first served

_FAKE_ERRORS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    DependsOnValuesError,
)
_FAKE_WORDS = re.compile(r"fake ?tensor|tensor subclass|data pointer|meta tensor", re.IGNORECASE)


@frozen
class Unit:
    """Tensors that are made together, because the same calls touch them.

    Args:
        paths: The tensors, in the order of the tree, each under the path at which it is made.
        calls: The calls, in order; the last write wins.
        scratch: Tensors that the calls touch, but whose values come from elsewhere.
    """

    paths: tuple[str, ...]
    calls: tuple[Call, ...]
    scratch: tuple[str, ...]


@frozen
class Traced:
    """One call, and what it does to which tensors.

    Args:
        call: The call.
        touched: What it does, by canonical path.
        places: For tied tensors that the called module itself holds, the path at which it does: it runs before they are
            tied, as in the module's constructor, and counts only if the tensor is made at that path.
    """

    call: ModuleCall | TensorCall | FillCall
    touched: Mapping[str, Touch]
    places: Mapping[str, str]

    def reaches(self, path: str, place: str) -> bool:
        """Tell whether it touches a tensor that is made at ``place``."""
        return path in self.touched and self.places.get(path, place) == place

    def writes(self, path: str, place: str) -> bool:
        """Tell whether it writes a tensor that is made at ``place``."""
        return self.reaches(path, place) and self.touched[path].writes


def find_units(
    model: nn.Module, tree: SpecTree, callables: Mapping[str, Any], init_weights: str | None
) -> tuple[list[Unit], dict[str, Made], list[Problem]]:
    """Return how the tensors without values are made: units in order, the source of each tensor, what is wrong.

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
    tracer = _Tracer(model, tree, callables)
    calls, winner, problems = _winners(model, tree, tracer, init_weights, needed)
    touching: dict[str, list[tuple[Owner, Traced]]] = {}
    for owner, one in calls:
        for path in one.touched:
            touching.setdefault(path, []).append((owner, one))
    makers: dict[str, list[Traced]] = {}
    for path, (wins, place) in winner.items():
        last = _OWNERS.index(wins)
        makers[path] = [one for owner, one in touching[path] if one.writes(path, place) and _OWNERS.index(owner) <= last]
    overrides, idle = _overrides(tree, tracer)
    makers |= {path: [one] for path, one in overrides.items()}
    problems += idle
    if not problems:  # else the code that failed may be what would have written the rest
        for path in (path for path in tree if path in needed and path not in winner):
            writers = [one for _, one in touching.get(path, []) if one.touched[path].writes]
            problems.append(_nobody(tree, path, writers))
    order = {id(one): place for place, one in enumerate([*(one for _, one in calls), *overrides.values()])}
    sources = {path: Made(tuple(one.call for one in ones)) for path, ones in makers.items()}
    places = {path: place for path, (_, place) in winner.items()}
    return _units(tree, makers, places, order), sources, problems


def _winners(
    model: nn.Module, tree: SpecTree, tracer: _Tracer, init_weights: str | None, needed: set[str]
) -> tuple[list[tuple[Owner, Traced]], dict[str, tuple[Owner, str]], list[Problem]]:
    """Return all calls in the order in which they would run, and whose code gives each tensor its values, at which path."""
    traced: dict[Owner, list[Traced]] = {}
    winner: dict[str, tuple[Owner, str]] = {}
    problems: list[Problem] = []
    for owner in _OWNERS:
        if not needed - winner.keys():
            break
        traced[owner], wrong = tracer.trace(_calls(model, owner, init_weights))
        problems += wrong
        writers: dict[str, list[Traced]] = {}
        for one in traced[owner]:
            for path in one.touched:
                writers.setdefault(path, []).append(one)
        for path in needed & writers.keys() - winner.keys():
            covered = [place for place in tree[path].paths if _num_covered(tree, path, place, writers[path]) is None]
            if covered:
                winner[path] = owner, covered[0]
    return [(owner, one) for owner in reversed(_OWNERS) for one in traced.get(owner, [])], winner, problems


def _num_covered(tree: SpecTree, path: str, place: str, calls: Iterable[Traced]) -> int | None:
    """Return how many elements of a tensor that is made at ``place`` get values; None for all of them."""
    views = [view for one in calls if one.writes(path, place) for view in one.touched[path].overwritten]
    num = num_covered(views, tree[path].num_elements)
    return None if views and num == tree[path].num_elements else num


def _overrides(tree: SpecTree, tracer: _Tracer) -> tuple[dict[str, Traced], list[Problem]]:
    """Return the calls of ``.init``, by the path that each gives values, and those that do not."""
    asked = [(spec, spec.source.calls[0]) for spec in tree.values() if isinstance(spec.source, Made)]
    traced, problems = tracer.trace(call for _, call in asked if isinstance(call, TensorCall))
    functions = {one.call.path: one for one in traced if isinstance(one.call, TensorCall)}
    overrides: dict[str, Traced] = {}
    for spec, call in asked:
        if isinstance(call, FillCall):
            overrides[spec.path] = Traced(call, {spec.path: Touch(writes=True)}, {})
            continue
        tried = [functions[spec.path]] if spec.path in functions else []
        num = _num_covered(tree, spec.path, spec.path, tried)
        if num is None:
            overrides[spec.path] = tried[0]
        elif not problems:
            cause = f"its function {call} gives values to {num} of its {spec.num_elements} elements"
            fix = "Write the tensor that it is given, in place: tensor.fill_(1), torch.nn.init.normal_(tensor)"
            problems.append(Problem(spec.path, cause, fix, spec.type))
    return overrides, problems


def run_call(model: nn.Module, call: Call, callables: Mapping[str, Any]) -> None:
    """Run one piece of init code on a model whose tensors it touches are there."""
    match call:
        case ModuleCall(kind="init_weights", module=path, code=code):
            function = find(code, callables)
            module = model.get_submodule(path)
            function(module, path) if takes_path(function) else function(module)
        case ModuleCall(kind="_init_weights", module=path, owner=owner):
            code: Any = model.get_submodule(owner)
            code._init_weights(model.get_submodule(path))  # noqa: SLF001  transformers' name for it
        case ModuleCall(kind=kind, module=path):
            getattr(model.get_submodule(path), kind)()
        case TensorCall(path=path, function=name):
            find(name, callables)(get_tensor(model, path))
        case FillCall(path=path, value=value):
            get_tensor(model, path).fill_(value)


def takes_path(function: Callable[..., Any]) -> bool:
    """Tell whether the user's init code is ``(module, path)`` rather than ``(module)``.

    >>> takes_path(lambda module: None), takes_path(lambda module, path: None), takes_path(lambda module, std=0.02: None)
    (False, True, False)
    """
    return len(names := _positional(function)) > 1 and names[1] in ("path", "name")


def wrong_signature(function: Callable[..., Any]) -> str:
    """Return the signature of the user's init code if it can be called neither as ``(module)`` nor ``(module, path)``.

    >>> wrong_signature(lambda module, std: None), wrong_signature(lambda module, path: None)
    ('(module, std)', '')
    """
    arguments = ("module", "path") if takes_path(function) else ("module",)
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return str(inspect.signature(function))
    except ValueError:  # a builtin that does not tell
        pass
    return ""


def _positional(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _calls(model: nn.Module, owner: Owner, init_weights: str | None) -> Iterator[ModuleCall]:
    holding = {path.rpartition(".")[0] for path, _, _ in named_tensors(model)}
    for path, module, pretrained in _children_first(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        match owner:
            case "user" if init_weights and path in holding:
                yield ModuleCall(path, "init_weights", init_weights)
            case "transformers" if pretrained is not None:
                code = model.get_submodule(pretrained)._init_weights  # noqa: SLF001
                yield ModuleCall(path, "_init_weights", _code_name(code), pretrained)
            case "reset":
                for kind in ("reset_parameters", "_reset_parameters"):
                    if callable(code := getattr(module, kind, None)):
                        yield ModuleCall(path, kind, _code_name(code))
                        break
            case _:
                pass


def _children_first(
    module: nn.Module, path: str = "", pretrained: str | None = None, seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Iterate over modules, each once, children before parents, with the path of the nearest Hugging Face model around."""
    seen = set() if seen is None else seen
    seen.add(id(module))
    if any(
        c.__name__ == "PreTrainedModel" and c.__module__.partition(".")[0] == "transformers" for c in type(module).__mro__
    ):
        pretrained = path
    for name, child in module.named_children():
        if id(child) not in seen:
            yield from _children_first(child, f"{path}.{name}".lstrip("."), pretrained, seen)
    yield path, module, pretrained


def _code_name(code: Any) -> str:
    return f"{code.__module__}:{code.__qualname__}"


class _Tracer:
    """Runs calls on a copy of the model with fake tensors at their original shapes."""

    def __init__(self, model: nn.Module, tree: SpecTree, callables: Mapping[str, Any]) -> None:
        self._callables = callables
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = copy_module(model, self._fake, for_planning=True)
        self._tree = tree
        self._held: dict[str, list[tuple[str, str]]] = {}  # by module, the places of tied tensors, and what stands there
        for spec in tree.values():
            owners = [self._model.get_submodule(module_of(path)) for path in spec.paths]
            for path, owner in zip(spec.paths, owners, strict=True):
                put_tensor(self._model, path, tied(get_tensor(self._model, path), get_tensor(self._model, spec.path)))
                if owners.count(owner) == 1 and spec.tie:
                    self._held.setdefault(module_of(path), []).append((path, spec.path))
        self._names = {_storage(get_tensor(self._model, path)): path for path in tree}
        self._alive: list[object] = []

    def trace(self, calls: Iterable[ModuleCall | TensorCall]) -> tuple[list[Traced], list[Problem]]:
        """Return what each call does, leaving out those that write nothing."""
        traced: list[Traced] = []
        problems: list[Problem] = []
        with self._mode, torch.no_grad(), own_generators(0):
            for call in calls:
                held = self._held.get(call.module, []) if isinstance(call, ModuleCall) else []
                before = {place: get_tensor(self._model, place) for place, _ in held}
                self._untie(held)
                outcome = self._run(call, {path: place for place, path in held})
                for place, tensor in before.items():
                    put_tensor(self._model, place, tensor)
                if isinstance(outcome, Problem):
                    problems.append(outcome)
                elif any(touch.writes for touch in outcome.touched.values()):
                    traced.append(outcome)
        return traced, problems

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    def _untie(self, held: Iterable[tuple[str, str]]) -> None:
        for place, path in held:
            if place != path:
                old = get_tensor(self._model, place)
                put_tensor(self._model, place, like(old, self._fake(old)))
                self._name(get_tensor(self._model, place), path)

    def _name(self, tensor: torch.Tensor, path: str) -> None:
        self._names[_storage(tensor)] = path
        self._alive.append(tensor.untyped_storage())  # else its identity would be given to another one

    def _run(self, call: ModuleCall | TensorCall, places: Mapping[str, str]) -> Traced | Problem:
        at = call.module if isinstance(call, ModuleCall) else call.path
        path = at if isinstance(call, ModuleCall) else module_of(at)
        module = self._model.get_submodule(path)
        before = {name: tensor.untyped_storage() for name, _, tensor in named_tensors(module)}
        recorder = Recorder(self._names)
        opaque = False
        try:
            with recorder:
                run_call(self._model, call, self._callables)
        except Exception as error:  # noqa: BLE001  it is the user's code, and what it raises is reported
            opaque = isinstance(error, _FAKE_ERRORS) or bool(_FAKE_WORDS.search(str(error)))
            if not opaque:
                cause = f"its init code {call} raises {type(error).__name__}: {error}"
                return Problem(at, cause, "Mend the code, or give values with .init(...)")
        touched = recorder.touched
        for name, _, tensor in named_tensors(module):
            full = f"{path}.{name}" if path else name
            if full in self._tree and (name not in before or before[name]._cdata != _storage(tensor)):  # noqa: SLF001
                known = self._tree[full]  # code has put another tensor in place: weight.data = ...
                touched[known.path] = Touch(writes=True, overwritten={whole_view(known.orig_shape)})
                self._name(tensor, known.path)
        if opaque:  # it may have been about to write all that is there
            named = [at] if isinstance(call, TensorCall) else [name for name, *_ in own_tensors(path, module)]
            for known in (self._tree[name] for name in named if name in self._tree):
                touched[known.path] = Touch(reads=True, writes=True, overwritten={whole_view(known.orig_shape)})
        return Traced(evolve(call, opaque=opaque), touched, places)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  the only identity of a fake storage


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
