"""Export a model as the first rank has it, on fake tensors: a flat graph of operations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ...specs.errors import PlanError, Problem
from ..layout.local_model import LocalModel, quiet
from ..layout.user_syncs import stand_in
from ..model.open_modules import OpenModules
from ..model.rng_state import own_generators
from .example_inputs import recorded, with_free_sizes
from .export_hazards import collect_hazards
from .opaque_calls import LeafCall, OpaqueCall, OpaqueCalls, is_opaque
from .repeat_markers import MarkedLayers, write_out

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec


_STRANGE_OUTPUT = re.compile(r"Found <class '([^']+)'> in output")
"""Message of torch where a model returns an object that is no tensor or container of tensors."""


@frozen
class Captured:
    """A model as a graph, in training or in evaluation.

    Args:
        graph: Every operation, in the order in which the model's code runs them.
        root: Holds the constants, and the regions without gradients, to which the graph refers.
        returns: The pytree structure of the model's return value, whose leaves are the graph's outputs.
        calls: The calls that the export did not follow.
        num_calls: How often each module was called, by path.
        ranges: Least and most of each variable size, by its symbol in the graph.
        guards: Conditions on the inputs' sizes that the code has tested, as torch writes them.
    """

    graph: fx.Graph
    root: nn.Module
    returns: TreeSpec
    calls: Sequence[OpaqueCall]
    num_calls: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int | None]]
    guards: Sequence[str]


def capture(subject: LocalModel, *, training: bool) -> Captured:
    """Export a model in training or in evaluation.

    Raises:
        PlanError: If it cannot be exported; it says where it stopped.
    """
    try:
        found = _export(subject, training=training, once=True)
    except PlanError:
        found = None
    found = found or _export(subject, training=training, once=False)
    assert found is not None, "without repetitions nothing is out of reach"
    return found


def _export(subject: LocalModel, *, training: bool, once: bool) -> Captured | None:
    """Export a model, with ``once`` repeated layers a single time; return None if that turns out to be impossible."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))
    opaque = OpaqueCalls()
    local = subject.fake_copy(
        mode, named=True, synchronise=lambda step, function: opaque.function(step.op, stand_in(step, function))
    )
    if not training or not local.training:
        local.train(training)  # else modules that the user has put in evaluation stay so in training
    running = OpenModules()
    for path in subject.leaves:
        opaque.hide(path, local.get_submodule(path))
    layers = MarkedLayers(subject.layout, subject.tree, running.num_calls)
    if once:
        layers.watch(subject.model, local, subject.leaves)
    running.follow(local)
    layers.settle(local)
    assert subject.example_inputs is not None, "a model is exported with them"
    inputs, sizes = with_free_sizes(recorded(subject.example_inputs)[0], mode)
    hazards: list[Problem] = []
    try:
        with mode, own_generators(0), torch.enable_grad(), quiet(), collect_hazards(running, subject.leaves) as hazards:
            exported: Any = torch.export.export(local, (), inputs, dynamic_shapes=sizes, strict=False)
            module = exported.module(check_guards=False)
    except Exception as error:
        raise PlanError(hazards or [_not_exported(local, running.innermost, error)]) from error
    if hazards:
        raise PlanError(hazards)
    if not write_out(module.graph, layers, subject.tree, opaque.calls):
        return None
    if problems := list(_out_of_reach(module.graph, opaque.calls)):
        raise PlanError(problems)
    ranges = {str(symbol): _range(found) for symbol, found in exported.range_constraints.items()}
    guards = exported._guards_code  # noqa: SLF001  torch's public API only runs them
    return Captured(module.graph, module, exported.call_spec.out_spec, opaque.calls, running.num_calls, ranges, guards)


def _out_of_reach(graph: fx.Graph, calls: Sequence[OpaqueCall]) -> Iterator[Problem]:
    """Iterate over the problems of calls in a region without gradients, which is a single operation of the graph."""
    found = {node.args[1] for node in graph.nodes if is_opaque(node)}
    for number, call in enumerate(calls):
        if number not in found:
            path = call.callee.path if isinstance(call.callee, LeafCall) else call.callee.name
            cause = "it is called under torch.no_grad(), and such a region is one operation of a stage"
            yield Problem(path, cause, "Hand over the stages yourself: sch.with_stages([...])")


def _range(found: Any) -> tuple[int, int | None]:
    """Return the least and the most of a size; torch's least of 2 only means that it has not tried 0 and 1."""
    least = int(found.lower)
    return (0 if least <= 2 else least), int(found.upper) if found.upper.is_Integer else None  # noqa: PLR2004


def _not_exported(local: nn.Module, path: str, error: Exception) -> Problem:
    if returned := _STRANGE_OUTPUT.search(str(error)):
        kind = returned[1].rpartition(".")[2]
        takes_flag = "use_cache" in inspect.signature(local.forward).parameters
        fix = (
            "example_inputs={..., 'use_cache': False}" if takes_flag else "Let it return tensors, in tuples or a ModelOutput"
        )
        return Problem("", f"the model returns a {kind}, and a pipeline gives tensors", fix)
    lines = str(error).strip().splitlines()
    kind = type(local.get_submodule(path)).__name__
    cause = f"torch.export stops in this {kind}: {type(error).__name__}: {lines[0] if lines else ''}"
    where = next((line.strip() for line in lines if line.strip().startswith("Caused by: ")), "")
    cause += f" ({where.removeprefix('Caused by: ')})" if where else ""
    hand = "and over the stages yourself: sch.with_stages([...])"
    return Problem(path, cause, f"Mark it as a leaf: sch.at[{path!r}].leaf(); or h{hand}" if path else f"H{hand}")
