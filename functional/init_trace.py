"""What init code does to which tensors, found by running it on fake ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

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
from ..specs.source import FillCall, ModuleCall, TensorCall
from .generators import own_generators
from .init_calls import run_call
from .module_copy import copy_module, get_tensor, like, module_of, put_tensor, tied
from .recorder import DependsOnValuesError, Recorder, Touch, whole_view
from .skeleton import named_tensors, own_tensors

if TYPE_CHECKING:
    from ..specs.tree import SpecTree

_FAKE_ERRORS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    DependsOnValuesError,
)
_FAKE_WORDS = re.compile(r"fake ?tensor|tensor subclass|data pointer|meta tensor", re.IGNORECASE)


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


class Tracer:
    """Runs calls on a copy of the model with fake tensors at their original shapes."""

    def __init__(self, model: nn.Module, tree: SpecTree, callables: Mapping[str, Any]) -> None:
        self._callables = callables
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = copy_module(model, self._fake, for_planning=True)
        self._tree = tree
        self._held: dict[str, list[tuple[str, str]]] = {}  # by module, the places of tied tensors, and what stands there
        for spec in (spec for spec in tree.values() if spec.tie):
            owners = [self._model.get_submodule(module_of(path)) for path in spec.paths]
            for path, owner in zip(spec.paths, owners, strict=True):
                put_tensor(self._model, path, tied(get_tensor(self._model, path), get_tensor(self._model, spec.path)))
                if owners.count(owner) == 1:
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
