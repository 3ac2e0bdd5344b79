"""Check that a split model fits together, by a forward pass at local shapes on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ....specs.errors import Problem
from ....specs.layout_steps import SetAttributes, SetToLocalSize, SumGradient
from ....specs.paths import join
from ...model.open_modules import OpenModules
from ..local_model import LocalModel, following
from .partial_gradients import ActivationSharing
from .run_once import SkippedLayers

if TYPE_CHECKING:
    from ....specs.param import ParamSpec
    from ....specs.tree import SpecTree


def check_forward(subject: LocalModel) -> list[Problem]:
    """Return the problems of a forward pass of the first rank: the module where it stops, gradients that stay partial."""
    forward, example_inputs = subject.model.forward, subject.example_inputs
    if not isinstance(example_inputs, Mapping):
        return [Problem("example_inputs", "they are tensors by the names of the model's arguments", "{'input_ids': tensor}")]
    try:
        inspect.signature(forward).bind(**example_inputs)
    except TypeError as error:
        fix = f"forward takes {inspect.signature(forward)}"
        return [Problem("example_inputs", f"the model cannot be called with them: {error}", fix)]
    found = _look(subject, once=True)
    if found is None:  # problems in repeated layers: each layer runs, so that all problems are found
        found = _look(subject, once=False)
    assert found is not None, "without repetitions all layers have run"
    return found


def _look(subject: LocalModel, *, once: bool) -> list[Problem] | None:
    """Return the problems; None if there are any and, with ``once``, repeated layers were skipped."""
    tree, layout, first = subject.tree, subject.layout, subject.mesh.coordinate(0)
    running = OpenModules()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    local = subject.fake_copy(mode)
    is_split = {path: bool(set(spec.mesh_axes(first)) - {"expert"}) for path, spec in tree.items()}
    sharing = ActivationSharing(local, tree, running, is_split)
    layers = SkippedLayers(layout, tree, running.num_calls, tensor_key=sharing.key)
    with following(mode), torch.no_grad():
        if once:
            layers.watch(subject.model, local)
        running.follow(local)
        layers.settle(local)
        try:
            with sharing:
                local(**subject.fake_inputs())
        except Exception as error:  # noqa: BLE001  the model's code may raise any error, which is reported
            return None if layers.representative_of else [_stopped(local, tree, running.innermost, error)]
    met = sharing.met.union(*(layers.repeats_of(path) for path in sharing.met))
    changing = {step.module for step in layout if not isinstance(step, (SetAttributes, SetToLocalSize))}
    silent = changing - running.num_calls.keys()
    summed = dict.fromkeys(join(s.module, s.name) for s in layout if isinstance(s, SumGradient) and _is_of_all(s))
    alone = (tree[path] for path in summed if tree[path].path not in met)
    problems = [*sharing.problems.values(), *map(_never_called, sorted(silent)), *map(_counted_twice, alone)]
    return None if layers.representative_of and (problems or not layers.is_sound) else problems


def _is_of_all(step: SumGradient) -> bool:
    return step.mesh_axis != "expert_data" and not step.sharing


def _counted_twice(spec: ParamSpec) -> Problem:
    cause = "its gradient is summed over ranks, and it works on whole activations: each rank has the whole gradient already"
    return Problem(spec.path, cause, "Leave out its .sum_gradient()", spec.type)


def _never_called(path: str) -> Problem:
    cause = "it is not called in this forward pass, so that nothing is synchronised there"
    return Problem(path, cause, "Synchronise a module that is called; code that uses its weight directly goes past it")


def _stopped(model: nn.Module, tree: SpecTree, path: str, error: Exception) -> Problem:
    module = model.get_submodule(path)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)):
        cause = f"the code of this {type(module).__name__} depends on values ({error}), and fake tensors have none"
        fix = "Let it compute without them (transformers' experts: experts_implementation='grouped_mm'), or plan without"
        return Problem(path, cause, f"{fix} example_inputs (--batch and --sequence), which leaves out this check")
    prefix = f"{path}." if path else ""
    near = [f"{s.path.removeprefix(prefix)} {s.type}" for s in tree.values() if s.path.startswith(prefix) and s.shards]
    what = f"{type(module).__name__} with {', '.join(near[:4])}" if near else type(module).__name__
    text = str(error).strip().splitlines()
    cause = f"a forward pass at local shapes stops in this {what}: {type(error).__name__}: {text[0] if text else ''}"
    fix = "Its inputs and tensors do not meet: split both sides alike, add a .sync, or .set the sizes that it keeps"
    return Problem(path, cause, fix)
