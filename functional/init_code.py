"""Which init code makes which tensors: found by running all of it once on fake tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import torch
from attrs import frozen
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
from .module_copy import copy_module, get_tensor, like, put_tensor
from .recorder import DependsOnValuesError, Recorder, Touch
from .skeleton import named_tensors

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
        paths: The tensors, in the order of the tree, each under the path at which the calls write it: a tied tensor is made
            where code writes it first, as if it were tied afterwards.
        calls: The calls, in order; the last write wins.
        scratch: Tensors that the calls touch, but whose values come from elsewhere.
    """

    paths: tuple[str, ...]
    calls: tuple[Call, ...]
    scratch: tuple[str, ...]


@frozen
class Traced:
    """One call, and what it does to which tensors."""

    call: Call
    touched: Mapping[str, Touch]


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
    writers: dict[str, list[tuple[Owner, Traced]]] = {}
    for owner, one in calls:
        for path, touch in one.touched.items():
            if touch.writes:
                writers.setdefault(path, []).append((owner, one))
    makers: dict[str, list[Traced]] = {}
    for spec in tree.values():
        if spec.path in winner:
            wins, path = winner[spec.path]
            makers[path] = [one for owner, one in writers[path] if _OWNERS.index(owner) <= _OWNERS.index(wins)]
    overrides, idle = _overrides(tree, tracer)
    makers |= {path: [one] for path, one in overrides.items()}
    problems += idle
    if not problems:  # else the code that failed may be what would have written the rest
        unwritten = [path for path in tree if path in needed and path not in winner]
        problems = [_nobody(tree, path, [one for _, one in writers.get(path, [])]) for path in unwritten]
    order = {id(one): place for place, one in enumerate([*(one for _, one in calls), *overrides.values()])}
    sources = {tree[path].path: Made(tuple(one.call for one in ones)) for path, ones in makers.items()}
    return _units(tree, makers, order), sources, problems


def _winners(
    model: nn.Module, tree: SpecTree, tracer: _Tracer, init_weights: str | None, needed: set[str]
) -> tuple[list[tuple[Owner, Traced]], dict[str, tuple[Owner, str]], list[Problem]]:
    """Return all calls in the order in which they would run, and whose code gives each tensor its values, at which path."""
    traced: dict[Owner, list[Traced]] = {}
    winner: dict[str, tuple[Owner, str]] = {}
    problems: list[Problem] = []
    for owner in _OWNERS:
        if needed - winner.keys():
            traced[owner], wrong = tracer.trace(_calls(model, owner, init_weights))
            problems += wrong
            views = _views(traced[owner])
            for spec in tree.values():
                covered = [path for path in spec.paths if views.get(path, -1) >= spec.num_elements]
                if covered and spec.path in needed:
                    winner.setdefault(spec.path, (owner, covered[0]))
    return [(owner, one) for owner in reversed(_OWNERS) for one in traced.get(owner, [])], winner, problems


def _overrides(tree: SpecTree, tracer: _Tracer) -> tuple[dict[str, Traced], list[Problem]]:
    """Return the calls of ``.init``, by the path that each gives values, and those that do not."""
    asked = [(spec, spec.source.calls[0]) for spec in tree.values() if isinstance(spec.source, Made)]
    traced, problems = tracer.trace(call for _, call in asked if isinstance(call, TensorCall))
    functions = {one.call.path: one for one in traced if isinstance(one.call, TensorCall)}
    overrides: dict[str, Traced] = {}
    for spec, call in asked:
        if isinstance(call, FillCall):
            overrides[spec.path] = Traced(call, {spec.path: Touch(writes=True)})
            continue
        num = _views([functions[spec.path]]).get(spec.path, 0) if spec.path in functions else 0
        if num >= spec.num_elements:
            overrides[spec.path] = functions[spec.path]
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
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:  # noqa: PLR2004
        return False
    return positional[1].default is inspect.Parameter.empty or positional[1].name in ("path", "name")


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
        with self._mode:
            self._model = copy_module(model, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"), keep_scripted=True)
            self._untie(tree)
        self._tree = tree
        self._names: dict[int, str] = {}  # the first path of each place that holds a tensor, by the tensor's storage
        self._places: dict[str, str] = {}  # the same, by any path of the place
        self._alive: list[object] = []
        for path, _, tensor in named_tensors(self._model):
            if path in tree:
                self._places[path] = self._names.setdefault(_storage(tensor), path)

    def _untie(self, tree: SpecTree) -> None:
        """Give every place a tensor of its own: a model's init code runs before its ties are made."""
        for spec in tree.values():
            seen = {id(self._model.get_submodule(spec.module))}
            for path in spec.tie:
                owner = self._model.get_submodule(path.rpartition(".")[0])
                if id(owner) not in seen or path.rpartition(".")[2] != spec.path.rpartition(".")[2]:
                    old = get_tensor(self._model, path)
                    put_tensor(self._model, path, like(old, torch.empty_like(old)))
                seen.add(id(owner))

    def trace(self, calls: Iterable[ModuleCall | TensorCall]) -> tuple[list[Traced], list[Problem]]:
        """Return what each call does, leaving out those that write nothing."""
        traced: list[Traced] = []
        problems: list[Problem] = []
        with self._mode, torch.no_grad(), own_generators(0):
            for call in calls:
                recorder = Recorder(self._names)
                path = call.module if isinstance(call, ModuleCall) else call.path.rpartition(".")[0]
                module = self._model.get_submodule(path)
                before = {name: tensor.untyped_storage() for name, _, tensor in named_tensors(module)}
                opaque = False
                try:
                    with recorder:
                        run_call(self._model, call, self._callables)
                except Exception as error:  # noqa: BLE001  it is the user's code, and what it raises is reported
                    opaque = isinstance(error, _FAKE_ERRORS) or bool(_FAKE_WORDS.search(str(error)))
                    if not opaque:
                        cause = f"its init code {call} raises {type(error).__name__}: {error}"
                        at = call.module if isinstance(call, ModuleCall) else call.path
                        problems.append(Problem(at, cause, "Mend the code, or give values with .init(...)"))
                self._note_rebound(path, module, before, recorder.touched)
                if opaque:
                    self._note_all(call, module, recorder.touched)
                if any(touch.writes for touch in recorder.touched.values()):
                    traced.append(Traced(call, recorder.touched))
        return traced, problems

    def _note_rebound(
        self, path: str, module: nn.Module, before: dict[str, torch.UntypedStorage], touched: dict[str, Touch]
    ) -> None:
        """Notice code that puts another tensor in place (``weight.data = ...``) instead of writing into it."""
        for name, _, tensor in named_tensors(module):
            place = self._places.get(f"{path}.{name}" if path else name)
            if place is None or (name in before and before[name]._cdata == _storage(tensor)):  # noqa: SLF001
                continue
            touched[place] = Touch(writes=True, overwritten={"rebound": self._tree[place].num_elements})
            self._names[_storage(tensor)] = place
            self._alive.append(before.get(name))  # else its identity would be given to another storage

    def _note_all(self, call: ModuleCall | TensorCall, module: nn.Module, touched: dict[str, Touch]) -> None:
        """Take it that code which cannot be followed to its end writes its tensor, or all that its module holds."""
        if isinstance(call, TensorCall):
            paths = [call.path]
        else:
            names = (*module._parameters, *module._buffers)  # noqa: SLF001
            paths = [f"{call.module}.{name}" if call.module else name for name in names]
        for place in (self._places[path] for path in paths if path in self._places):
            touched[place] = Touch(reads=True, writes=True, overwritten={"opaque": self._tree[place].num_elements})


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  the only identity of a fake storage


def _views(traced: Sequence[Traced]) -> dict[str, int]:
    """Return how many elements of each tensor the calls give values, by the sizes of the distinct views that they write."""
    views: dict[str, dict[object, int]] = {}
    for one in traced:
        for path, touch in one.touched.items():
            if touch.writes:
                views.setdefault(path, {}).update(touch.overwritten)
    return {path: sum(sizes.values()) for path, sizes in views.items()}


def _nobody(tree: SpecTree, path: str, writers: Sequence[Traced]) -> Problem:
    spec = tree[path]
    if writers:
        num = _views(writers)[path]
        code = ", ".join(dict.fromkeys(str(one.call) for one in writers))
        cause = f"init code ({code}) gives values to {num} of its {spec.num_elements} elements"
    else:
        cause = "no init code writes it"
    fix = f"Give it values: sch.at[{path!r}].init(0.0), or .init(function) that writes the tensor"
    if spec.kind != "parameter":
        fix += "; or build its module on the CPU, and its values are kept"
    return Problem(path, cause, fix, spec.type)


def _units(tree: SpecTree, makers: Mapping[str, Sequence[Traced]], order: Mapping[int, int]) -> list[Unit]:
    """Join calls that touch a common tensor, and list the tensors of each such unit."""
    calls = {id(one): one for ones in makers.values() for one in ones}
    touches: nx.Graph[int | str] = nx.Graph()
    for key, one in calls.items():
        touches.add_edges_from((key, path) for path in one.touched if path in makers)
    made = {tree[path].path for path in makers}
    place = {spec.path: number for number, spec in enumerate(tree.values())}
    units: list[Unit] = []
    for members in nx.connected_components(touches):
        ones = [calls[key] for key in sorted((key for key in members if isinstance(key, int)), key=order.__getitem__)]
        paths = sorted((path for path in members if isinstance(path, str)), key=lambda path: place[tree[path].path])
        others = {tree[path].path for one in ones for path in one.touched} - made
        units.append(Unit(tuple(paths), tuple(one.call for one in ones), tuple(sorted(others, key=place.__getitem__))))
    return sorted(units, key=lambda unit: place[tree[unit.paths[0]].path])
