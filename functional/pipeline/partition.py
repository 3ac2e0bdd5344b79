"""Cut a model into pipeline stages: the graph, the tensors, the inputs and the outputs of each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
from attrs import frozen
from torch import fx

from ...specs.errors import PlanError, Problem
from ...specs.pipeline import Activation, Pipeline, Stage, VariableSize
from .dataflow import DataFlow, module_path, read_flow
from .example_inputs import SizeNames, recorded
from .export import capture
from .export_hazards import backward_hooks
from .min_cut import values_to_send
from .stage_graph import StageGraph, UnknownSizeError, build_stage_graph, tensors_held

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from ...specs.tree import SpecTree
    from ..layout.local_model import LocalModel

_SIZE_IN_GUARD = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
"""The size of an input as torch writes it in a guard."""

MODES = {True: "training", False: "evaluating"}


@frozen
class StageCode:
    """The computation of a stage.

    Args:
        graphs: Its graph in training (True) and in evaluation (False).
        returns: For the last stage, the pytree structure of the model's return value in either mode; else None.
    """

    graphs: Mapping[bool, StageGraph]
    returns: Mapping[bool, TreeSpec] | None


@frozen
class Partition:
    """A model cut into stages.

    Args:
        pipeline: The stages as data.
        codes: The stages as graphs.
        holders: For each tensor, by canonical path, the stages that hold it; the first owns it.
    """

    pipeline: Pipeline
    codes: tuple[StageCode, ...]
    holders: Mapping[str, tuple[int, ...]]


@frozen
class _Half:
    """The partition in training, or in evaluation.

    Args:
        flow: The graph, cut into stages.
        names: Names of the sizes that may vary.
        ends: The outputs of each stage.
        graphs: The graph of each stage.
    """

    flow: DataFlow
    names: SizeNames
    ends: list[list[Any]]
    graphs: list[StageGraph]


def export_stages(subject: LocalModel, cuts: Sequence[str]) -> Partition:
    """Cut a model after given modules: export it in training and in evaluation, and divide both graphs.

    Args:
        subject: The model.
        cuts: Paths of the modules after which a stage ends; each is called once.

    Raises:
        PlanError: If it cannot be exported, or cannot be cut there.
    """
    if problems := list(_forgotten(subject)):
        raise PlanError(problems)
    halves = {training: _half(subject, cuts, training=training) for training in MODES}
    train = halves[True]
    stages: list[Stage] = []
    codes: list[StageCode] = []
    for stage in range(train.flow.num_stages):
        sides = {training: _sides(half, stage) for training, half in halves.items()}
        types = {training: [[a.type for a in side] for side in both] for training, both in sides.items()}
        if types[True] != types[False]:
            cause = f"stage {stage} takes and gives {types[True]} in training, and {types[False]} in evaluation"
            problems.append(Problem("", cause, "Hand over the stages yourself: sch.with_stages([...])"))
        graphs = {training: half.graphs[stage] for training, half in halves.items()}
        text = "\n\n".join(graph.text for graph in graphs.values())
        inputs, outputs = sides[True]
        stages.append(Stage(_modules(train.flow, stage), inputs, outputs, hashlib.sha256(text.encode()).hexdigest()))
        returns = {training: half.flow.captured.returns for training, half in halves.items()}
        codes.append(StageCode(graphs, returns if stage == train.flow.num_stages - 1 else None))
    if problems:
        raise PlanError(problems)
    pipeline = Pipeline(
        stages=tuple(stages),
        cuts=train.flow.cuts,
        leaves=subject.leaves,
        example=recorded(subject.example_inputs or {})[0],
        sizes=tuple(_both(*(half.names.sizes for half in halves.values()))),
        conditions=tuple(dict.fromkeys(condition for half in halves.values() for condition in _conditions(half))),
    )
    held = [
        {path for h in halves.values() for path in tensors_held(h.flow, h.graphs[stage])} for stage in range(len(stages))
    ]
    return Partition(pipeline, tuple(codes), stages_that_hold(subject.tree, held))


def _forgotten(subject: LocalModel) -> Iterator[Problem]:
    """Iterate over the problems of modules with effects that an export loses."""
    fix = "Mark the module as a leaf, which runs as it is"
    for path in backward_hooks(subject.model):
        yield Problem(path, "it has a hook on its backward pass, which the graph of a stage has not", fix)
    for path, module in subject.model.named_modules():
        is_inside = any(f"{path}.".startswith(f"{leaf}.") for leaf in subject.leaves)
        if not is_inside and getattr(module, "gradient_checkpointing", False) is True:
            cause = "it checkpoints its activations, and the graph of a stage would keep them all"
            fix = f"model.gradient_checkpointing_disable(), or sch.at[{path!r}].leaf(), which runs as it is"
            yield Problem(path, cause, fix)


def stages_that_hold(tree: SpecTree, held: Sequence[set[str]]) -> dict[str, tuple[int, ...]]:
    """Return the stages that hold each tensor; an unused tensor stays with the tensor before it.

    Args:
        tree: The tensors.
        held: The paths that each stage uses.
    """
    found: dict[str, tuple[int, ...]] = {}
    last = (0,)
    for spec in tree.values():
        stages = tuple(stage for stage, paths in enumerate(held) if not paths.isdisjoint(spec.paths))
        found[spec.path] = stages or last[:1]
        last = stages or last
    return found


def _half(subject: LocalModel, cuts: Sequence[str], *, training: bool) -> _Half:
    captured = capture(subject, training=training)
    flow, problems = read_flow(captured, subject.tree, cuts)
    problems = problems or list(flow.torn())
    if problems:
        raise PlanError(problems)
    ends: list[list[Any]] = [flow.outputs]
    for stage in reversed(range(1, flow.num_stages)):
        _, wanted = flow.needed(stage, ends[0], lambda node, at=stage: node in flow.fixed and flow.stage.get(node) == at)
        try:
            ends.insert(0, values_to_send(flow, wanted))
        except nx.NetworkXUnbounded:
            cause = f"stage {stage} needs something that is no tensor of the stage before"
            raise PlanError([Problem(flow.cuts[stage - 1], cause, "Cut another module")]) from None
    graphs: list[StageGraph] = []
    for stage, outputs in enumerate(ends):
        try:
            graphs.append(
                build_stage_graph(flow, stage, MODES[training], ends[stage - 1] if stage else flow.inputs, outputs)
            )
        except UnknownSizeError as error:
            raise PlanError(
                [Problem(flow.cuts[max(0, stage - 1)], f"stage {stage}: {error}", "Cut another module")]
            ) from None
    return _Half(
        flow, SizeNames(((str(node.target), node.meta["val"]) for node in flow.inputs), captured.ranges), ends, graphs
    )


def _sides(half: _Half, stage: int) -> tuple[tuple[Activation, ...], tuple[Activation, ...]]:
    """Return the inputs and the outputs of a stage."""
    before = half.ends[stage - 1] if stage else half.flow.inputs
    inputs, outputs = ([n for n in side if isinstance(n, fx.Node)] for side in (before, half.ends[stage]))
    return tuple(_activation(half, node) for node in inputs), tuple(_activation(half, node) for node in outputs)


def _activation(half: _Half, node: fx.Node) -> Activation:
    name = str(node.target) if node.op == "placeholder" else module_path(node) or node.name
    return half.names.activation(name, node.meta["val"], requires_grad=node in half.flow.needs_gradient)


def _conditions(half: _Half) -> Iterator[str]:
    """Iterate over the conditions on the sizes, by their names."""
    shapes = {str(node.target): node.meta["val"].shape for node in half.flow.inputs}
    for guard in half.flow.captured.guards:
        condition = _SIZE_IN_GUARD.sub(lambda found: str(half.names.name(shapes[found[1]][int(found[2])])), guard)
        left, is_equal, right = condition.partition(" == ")
        if not (is_equal and left == right):
            yield condition


def _both(training: Mapping[str, VariableSize], evaluating: Mapping[str, VariableSize]) -> Iterator[VariableSize]:
    """Iterate over the sizes for which both graphs hold."""
    for name, size in training.items():
        evaluated = evaluating.get(name, size)
        most = min((bound for bound in (size.most, evaluated.most) if bound is not None), default=None)
        yield VariableSize(name, size.example, max(size.least, evaluated.least), most)


def _modules(flow: DataFlow, stage: int) -> tuple[str, ...]:
    """Return the outermost modules that run in no other stage."""
    stages: dict[str, set[int]] = {}
    for node, at in flow.stage.items():
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            stages.setdefault(path, set()).add(at)
    whole = [path for path, found in stages.items() if found == {stage}]
    return tuple(_outermost(whole))


def _outermost(paths: Sequence[str]) -> Iterator[str]:
    inside = set(paths)
    for path in paths:
        names = path.split(".")
        if path and not any(".".join(names[:depth]) in inside for depth in range(1, len(names))):
            yield path
