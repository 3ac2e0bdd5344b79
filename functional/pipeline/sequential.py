"""Stages that call modules in sequence: the model is not exported, its modules run as they are."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import TreeSpec, tree_flatten

from ...specs.errors import PlanError, Problem
from ...specs.pipeline import ExampleInput, Pipeline, PlainInput, Stage, TensorInput
from ..layout.local_model import LocalModel, following
from .example_inputs import SizeNames, recorded
from .opaque_calls import tensors_of
from .partition import MODES, Partition, StageCode, stages_that_hold
from .stage_graph import StageGraph


def is_sequence(model: nn.Module, cuts: Sequence[str]) -> bool:
    """Tell whether a model is a plain ``nn.Sequential`` that is cut between its modules."""
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return False
    return set(cuts) <= set(model._modules)  # noqa: SLF001  named_children leaves out what stands there twice


def slice_sequence(model: nn.Module, cuts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the paths of the modules of each stage of an ``nn.Sequential``.

    Raises:
        PlanError: If it is cut after its last module.

    >>> slice_sequence(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["1"])
    (('0', '1'), ('2',))
    """
    stages: list[tuple[str, ...]] = [()]
    for name in model._modules:  # noqa: SLF001  named_children leaves out what stands there twice
        stages[-1] = (*stages[-1], name)
        if name in cuts:
            stages.append(())
    if not stages[-1]:
        raise PlanError(
            [Problem(stages[-2][-1], "nothing runs after it, and a stage would be empty", "Cut an earlier module")]
        )
    return tuple(stages)


def sequential_stages(subject: LocalModel, modules: Sequence[Sequence[str]]) -> Partition:
    """Return stages that call modules in sequence, each with the outputs of the module before.

    Args:
        subject: The model.
        modules: Paths of each stage's modules.

    Raises:
        PlanError: If a call fails, or returns an object that is no tensor.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))
    local = subject.fake_copy(mode)
    assert subject.example_inputs is not None, "the first stage is called with them"
    example, _ = recorded(subject.example_inputs)
    sides: list[list[tuple[str, Tensor]]] = [_inputs(example, mode)]
    graphs: list[fx.Graph] = []
    returns: TreeSpec | None = None
    for paths in modules:
        graph, given = fx.Graph(), sides[-1]
        nodes = [graph.placeholder(f"input_{place}") for place in range(len(given))]
        for path in paths:
            given, kept, returns = _call(local, path, given, mode)
            tensors = graph.call_function(tensors_of, (graph.call_module(path, tuple(nodes)), kept))
            nodes = [graph.call_function(operator.getitem, (tensors, place)) for place in range(len(kept))]
        graph.output(tuple(nodes))
        graphs.append(graph)
        sides.append(given)
    names = SizeNames(sides[0], {})  # only now, as the calls may have fixed a size
    activations = [
        tuple(names.activation(name, tensor, requires_grad=tensor.requires_grad) for name, tensor in side) for side in sides
    ]
    stages: list[Stage] = []
    codes: list[StageCode] = []
    for number, (paths, graph) in enumerate(zip(modules, graphs, strict=True)):
        kinds = (f"{path} {type(local.get_submodule(path)).__qualname__}" for path in paths)
        text = "\n".join([*kinds, *map(str, activations[number])])
        digest = hashlib.sha256(text.encode()).hexdigest()
        stages.append(Stage(tuple(paths), activations[number], activations[number + 1], digest))
        is_last = number == len(modules) - 1
        codes.append(
            StageCode(
                dict.fromkeys(MODES, StageGraph(graph, {}, {}, text)),
                dict.fromkeys(MODES, returns) if is_last and returns else None,
            )
        )
    pipeline = Pipeline(
        stages=tuple(stages),
        cuts=tuple(paths[-1] for paths in modules[:-1]),
        chain=tuple(map(tuple, modules)),
        example=example,
        sizes=tuple(names.sizes.values()),
    )
    held = [{p for p in subject.tree.all_paths if p.startswith(tuple(f"{path}." for path in paths))} for paths in modules]
    return Partition(pipeline, tuple(codes), stages_that_hold(subject.tree, held))


def _inputs(example: tuple[ExampleInput, ...], mode: FakeTensorMode) -> list[tuple[str, Tensor]]:
    inputs: list[tuple[str, Tensor]] = []
    for given in example:
        match given:
            case TensorInput(name=name, shape=shape, dtype=dtype):
                meta = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                sizes: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext([DimDynamic.DYNAMIC] * len(shape))
                symbolic = mode.from_tensor(meta, symbolic_context=sizes)
                with mode:
                    inputs.append((name, torch.empty(symbolic.shape, dtype=meta.dtype, device="cpu")))
            case PlainInput(name=name, value=value):
                cause = f"it is {value!r}, and stages that were handed over are called with tensors alone"
                raise PlanError([Problem(f"example_inputs[{name!r}]", cause, "Leave it out")])
    return inputs


def _call(
    local: nn.Module, path: str, given: list[tuple[str, Tensor]], mode: FakeTensorMode
) -> tuple[list[tuple[str, Tensor]], tuple[int, ...], TreeSpec]:
    """Return the output tensors of a module, their places among the leaves of its return value, and its structure."""
    module = local.get_submodule(path)
    try:
        with following(mode), torch.enable_grad():
            leaves, spec = tree_flatten(module(*(tensor for _, tensor in given)))
    except Exception as error:
        names = SizeNames(given, {})
        takes = ", ".join(str(names.activation(name, tensor, requires_grad=False)) for name, tensor in given)
        cause = f"called with what was given before it ({takes}), it raises {type(error).__name__}: {error}"
        fix = "Hand over modules each of which takes what the one before gives"
        raise PlanError([Problem(path, cause, fix)]) from error
    kept = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    if len(kept) < len(leaves):
        other = type(next(leaf for leaf in leaves if not isinstance(leaf, Tensor))).__name__
        raise PlanError(
            [Problem(path, f"it gives a {other} beside its tensors", "Let it give a tensor, or a tuple of tensors")]
        )
    return [(path, leaves[place]) for place in kept], kept, spec
