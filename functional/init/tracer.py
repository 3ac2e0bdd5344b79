"""Trace init code on fake tensors: the tensors that each call touches, and the operations by which it writes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from ...specs.errors import Problem
from ...specs.paths import join, module_of
from ...specs.program import InitProgram
from ...specs.source import ModuleCall, TensorCall
from ..model.attribute_reads import record_state_reads
from ..model.copy import copy_module, get_tensor, like, put_tensor, tied
from ..model.fake_values import DependsOnValuesError
from ..model.likeness import Likeness
from ..model.read import named_tensors, own_tensors, storage_id, view_id
from ..model.rng_state import own_generators, python_state
from .calls import run_call
from .recorder import Recorder, Touch
from .strided_views import whole_view

if TYPE_CHECKING:
    from ...specs.tree import SpecTree

_FAKE_ERRORS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    DependsOnValuesError,
)
_SEED = 0x5EED0F702C1477  # seed of the generator meanwhile, which no code is likely to set itself
_FAKE_WORDS = re.compile(r"fake ?tensor|tensor subclass|data pointer|meta tensor", re.IGNORECASE)


@frozen
class TracedCall:
    """A call of init code, and the tensors that it touches.

    Args:
        call: The call.
        touched: The record of each tensor that it touches, by canonical path.
        places: For tied tensors that the called module itself holds, the path at which it holds them: the call runs before
            they are tied, as in the module's constructor, and counts only if the tensor is made at that path.
    """

    call: ModuleCall | TensorCall
    touched: Mapping[str, Touch]
    places: Mapping[str, str]

    def reaches(self, path: str, place: str) -> bool:
        """Tell whether the call touches a tensor that is made at ``place``."""
        return path in self.touched and self.places.get(path, place) == place

    def writes(self, path: str, place: str) -> bool:
        """Tell whether the call writes a tensor that is made at ``place``."""
        return self.reaches(path, place) and self.touched[path].writes


class Tracer:
    """Run calls of init code on a copy of the model with fake tensors at their original shapes."""

    def __init__(self, model: nn.Module, tree: SpecTree, callables: Mapping[str, Any]) -> None:
        self._callables = callables
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = copy_module(model, self._fake, for_planning=True)
        self._tree = tree
        self._held: dict[str, list[tuple[str, str]]] = {}  # tied tensors of each module: path there, canonical path
        for spec in (spec for spec in tree.values() if spec.tie):
            owners = [self._model.get_submodule(module_of(path)) for path in spec.paths]
            for path, owner in zip(spec.paths, owners, strict=True):
                put_tensor(self._model, path, tied(get_tensor(self._model, path), get_tensor(self._model, spec.path)))
                if owners.count(owner) == 1:
                    self._held.setdefault(module_of(path), []).append((path, spec.path))
        self._names = {storage_id(get_tensor(self._model, path)): path for path in tree}
        self._shapes = {spec.path: spec.orig_shape for spec in tree.values()}
        self._alive: list[object] = []
        self._likeness = Likeness()
        self._first: dict[Hashable, TracedCall] = {}
        self._confirmed: set[Hashable] = set()
        self._reading_state: set[str] = set()  # owners whose code reads more of them than configuration and methods
        several = [path for spec in tree.values() if spec.tie for path in spec.paths]
        self._around_ties = {".".join(path.split(".")[:depth]) for path in several for depth in range(path.count(".") + 1)}

    def trace(self, calls: Iterable[ModuleCall | TensorCall]) -> tuple[list[TracedCall], list[Problem]]:
        """Return the calls that write tensors, and the problems of calls that raise.

        A call is not run where calls like it were: where the first two did the same, each to its own module.
        """
        traced: list[TracedCall] = []
        problems: list[Problem] = []
        quiet = logging.getLogger("torch._subclasses.fake_tensor")  # it prints the errors of init code
        with self._mode, torch.no_grad(), torch.device("cpu"), own_generators(_SEED), _disabled(quiet):
            for call in calls:
                key = self._key(call)
                if key in self._confirmed:
                    if _writes(self._first[key]):
                        traced.append(_moved(self._first[key], call))
                    continue
                held = self._held.get(call.module, []) if isinstance(call, ModuleCall) else []
                before = {place: get_tensor(self._model, place) for place, _ in held}
                self._untie(held)
                outcome, replaced = self._run(call, {path: place for place, path in held})
                for place, tensor in before.items():
                    put_tensor(self._model, place, tensor)
                self._renew(replaced)
                if isinstance(outcome, TracedCall) and _has_literals(outcome):
                    outcome = self._checked_again(outcome)
                if key is not None and isinstance(outcome, TracedCall) and _stays_within(outcome):
                    first = self._first.setdefault(key, outcome)
                    if first is not outcome and first.touched == _moved(outcome, first.call).touched:
                        self._confirmed.add(key)  # the code does not count its calls, say
                if isinstance(outcome, Problem):
                    problems.append(outcome)
                elif _writes(outcome):
                    traced.append(outcome)
        return traced, problems

    def _checked_again(self, traced: TracedCall) -> TracedCall:
        """Run code with tensor literals again: its numbers may come from a clock, or from a generator without a seed."""
        again, replaced = self._run(traced.call, traced.places)
        self._renew(replaced)
        if isinstance(again, TracedCall) and again.touched == traced.touched:
            return traced
        cause = "its code gives other numbers each time that it runs"
        return evolve(
            traced,
            touched={
                path: evolve(touch, operations=None, cause=cause) if touch.writes else touch
                for path, touch in traced.touched.items()
            },
        )

    def _key(self, call: ModuleCall | TensorCall) -> Hashable:
        """Return a key that is equal for calls that do the same, each to its own module; None if that is not known.

        It is known for the code of torch and transformers, which keeps no count, as long as it reads only the module that
        it is called for and a configuration.
        """
        if isinstance(call, TensorCall) or call.module in self._around_ties or call.owner in self._reading_state:
            return None
        if call.kind == "init_weights" or not _is_of_a_library(self._model, call):
            return None
        return call.kind, call.code, call.owner, self._likeness.number(self._model.get_submodule(call.module))

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        # as torch.empty in this mode, at a fifth of the cost
        return FakeTensor(self._mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), torch.device("cpu"))

    def _untie(self, held: Iterable[tuple[str, str]]) -> None:
        for place, path in held:
            if place != path:
                old = get_tensor(self._model, place)
                put_tensor(self._model, place, like(old, self._fake(old)))
                self._name(get_tensor(self._model, place), path)

    def _renew(self, replaced: Iterable[str]) -> None:
        """Put fresh tensors in place of tensors that the code has replaced, so that later code meets no views."""
        for path in replaced:
            spec = self._tree[path]
            old = get_tensor(self._model, path)
            fresh = like(old, self._fake(torch.empty(spec.orig_shape, dtype=getattr(torch, spec.dtype), device="meta")))
            for alias in spec.paths:
                put_tensor(self._model, alias, tied(get_tensor(self._model, alias), fresh))
            self._name(fresh, spec.path)

    def _name(self, tensor: torch.Tensor, path: str) -> None:
        self._names[storage_id(tensor)] = path
        self._alive.append(tensor.untyped_storage())  # else its identity would be reused

    def _run(self, call: ModuleCall | TensorCall, places: Mapping[str, str]) -> tuple[TracedCall | Problem, list[str]]:
        """Run a call; return its record or its problem, and the paths of tensors that it has replaced."""
        at = call.module if isinstance(call, ModuleCall) else call.path
        path = at if isinstance(call, ModuleCall) else module_of(at)
        module = self._model.get_submodule(path)
        before = {join(path, name): view_id(tensor) for name, _, tensor in named_tensors(module)}
        recorder = Recorder(self._names, self._shapes)
        failed = ""
        owner = call.owner if isinstance(call, ModuleCall) and call.kind == "_init_weights" and call.owner != path else None
        state = python_state()
        try:
            reading = nullcontext(set[str]()) if owner is None else record_state_reads(self._model.get_submodule(owner))
            with recorder, reading as names:
                run_call(self._model, call, self._callables)
            if owner is not None and names:
                self._reading_state.add(owner)
            if python_state() != state:
                failed = "its code draws from Python's or NumPy's generator"
        except Exception as error:  # noqa: BLE001  the user's code may raise any error, which is reported
            failed = f"its code cannot be followed: {type(error).__name__}"
            is_unknown = isinstance(error, _FAKE_ERRORS) or _FAKE_WORDS.search(str(error)) or recorder.has_guessed
            if not is_unknown:
                cause = f"its init code {call} raises {type(error).__name__}: {error}"
                return Problem(at, cause, "Mend the code, or give values with .init(...)"), []
        named = {join(path, name): tensor for name, _, tensor in named_tensors(module)}
        replaced = [name for name, tensor in named.items() if name in self._tree and view_id(tensor) != before.get(name)]
        for name in replaced:  # weight.data = ...
            with self._mode:
                recorder.assign(self._tree[name].path, named[name])
        touched = recorder.touched()
        if failed:  # it may have been about to read and write every tensor of its module
            own = [at] if isinstance(call, TensorCall) else [name for name, *_ in own_tensors(path, module)]
            whole = {spec.path: whole_view(spec.orig_shape) for name in own if (spec := self._tree.get(name))}
            touched |= {known: Touch(writes=True, overwritten=frozenset([view])) for known, view in whole.items()}
            of = frozenset(touched)
            touched = {
                known: evolve(touch, operations=None, cause=failed, of=of - {known}) for known, touch in touched.items()
            }
        return TracedCall(evolve(call, opaque=bool(failed)), touched, places), replaced


def _is_of_a_library(model: nn.Module, call: ModuleCall) -> bool:
    owner = model.get_submodule(call.owner if call.kind == "_init_weights" else call.module)
    library = "transformers." if call.kind == "_init_weights" else "torch."
    return all(cls.__module__.startswith(library) for cls in type(owner).__mro__ if call.kind in vars(cls))


@contextmanager
def _disabled(logger: logging.Logger) -> Iterator[None]:
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _has_literals(traced: TracedCall) -> bool:
    return any(
        node.op.startswith("lift_fresh")
        for touch in traced.touched.values()
        for constant in InitProgram(touch.operations or ()).constants
        for node in constant.nodes
    )


def _writes(traced: TracedCall) -> bool:
    return any(touch.writes for touch in traced.touched.values())


def _stays_within(traced: TracedCall) -> bool:
    """Tell whether a call touches no tensor outside of its module."""
    prefix = _prefix(traced.call)
    return all(path.startswith(prefix) for known, touch in traced.touched.items() for path in (known, *touch.of))


def _moved(traced: TracedCall, call: ModuleCall | TensorCall) -> TracedCall:
    """Return the record of a like call, with the paths of its own tensors."""
    old, new = _prefix(traced.call), _prefix(call)
    touched: dict[str, Touch] = {}
    for path, touch in traced.touched.items():
        of = frozenset(new + source.removeprefix(old) for source in touch.of)
        touched[new + path.removeprefix(old)] = evolve(touch, of=of) if of else touch
    return TracedCall(evolve(call, opaque=traced.call.opaque), touched, {})


def _prefix(call: ModuleCall | TensorCall) -> str:
    return f"{call.module}." if isinstance(call, ModuleCall) and call.module else ""
