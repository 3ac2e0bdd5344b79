"""Stages whose modules are called one after another: nothing is exported, the modules run as they are."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import TreeSpec, tree_flatten

from ..specs.errors import PlanError, Problem
from ..specs.pipeline import Pipeline, PlainInput, Stage, TensorInput
from .local_copy import following, local_copy
from .opaque import tensors_of
from .partition import MODES, Partition, StageCode, holders
from .sizes import SizeNames
from .stage_graph import StageGraph

if TYPE_CHECKING:
    from .capture import Subject


def is_sequence(model: nn.Module, cuts: Sequence[str]) -> bool:
    """Tell whether a model calls its modules one after another, and is cut between them."""
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return False
    return set(cuts) <= {name for name, _ in model.named_children()}


def slices(model: nn.Module, cuts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the modules of each stage of a sequence.

    >>> slices(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["1"])
    (('0', '1'), ('2',))
    """
    stages: list[list[str]] = [[]]
    names = [name for name, _ in model.named_children()]
    for name in names:
        stages[-1].append(name)
        if name in cuts and name != names[-1]:
            stages.append([])
    return tuple(map(tuple, stages))


def chain(subject: Subject, modules: Sequence[Sequence[str]]) -> Partition:
    """Return the stages of a model whose modules are called one after another, each with what the one before gave.

    Args:
        subject: The model as one rank has it.
        modules: Paths of each stage's modules.

    Raises:
        PlanError: If a call fails, or gives something that is no tensor.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))
    first = subject.mesh.coordinate(0)
    local = local_copy(subject.model, subject.tree, subject.layout, first, subject.callables, mode)
    named = _inputs(subject, mode)
    names = SizeNames(named, {})
    stages: list[Stage] = []
    codes: list[StageCode] = []
    for paths in modules:
        graph = fx.Graph()
        nodes = [graph.placeholder(f"input_{place}") for place in range(len(named))]
        given = [tensor for _, tensor in named]
        inputs = tuple(names.activation(name, tensor, requires_grad=tensor.requires_grad) for name, tensor in named)
        returns: TreeSpec | None = None
        for path in paths:
            given, kept, returns = _call(local, path, given, mode)
            returned = graph.call_module(path, tuple(nodes))
            tensors = graph.call_function(tensors_of, (returned, kept))
            nodes = [graph.call_function(operator.getitem, (tensors, place)) for place in range(len(kept))]
        graph.output(tuple(nodes))
        kinds = [f"{path} {type(local.get_submodule(path)).__qualname__}" for path in paths]
        text = "\n".join([*kinds, *map(str, inputs)])
        named = [(paths[-1], tensor) for tensor in given]
        outputs = tuple(names.activation(name, tensor, requires_grad=tensor.requires_grad) for name, tensor in named)
        stages.append(Stage(tuple(paths), inputs, outputs, hashlib.sha256(text.encode()).hexdigest()))
        graphs = dict.fromkeys(MODES, StageGraph(graph, {}, {}, text))
        codes.append(StageCode(graphs, returns if len(codes) == len(modules) - 1 else None))
    pipeline = Pipeline(
        stages=tuple(stages),
        chain=tuple(map(tuple, modules)),
        example=subject.example,
        sizes=tuple(names.sizes.values()),
    )
    held = [{p for p in subject.tree.all_paths if p.startswith(tuple(f"{path}." for path in paths))} for paths in modules]
    return Partition(pipeline, tuple(codes), holders(subject.tree, held))


def _inputs(subject: Subject, mode: FakeTensorMode) -> list[tuple[str, Tensor]]:
    inputs: list[tuple[str, Tensor]] = []
    for given in subject.example:
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
    local: nn.Module, path: str, given: list[Tensor], mode: FakeTensorMode
) -> tuple[list[Tensor], tuple[int, ...], TreeSpec]:
    module = local.get_submodule(path)
    try:
        with following(mode), torch.enable_grad():
            leaves, spec = tree_flatten(module(*given))
    except Exception as error:
        takes = ", ".join(f"{list(tensor.shape)}" for tensor in given)
        cause = f"called with {takes}, it raises {type(error).__name__}: {error}"
        raise PlanError(
            [Problem(path, cause, "Stages are called one after another, each with what the one before gave")]
        ) from error
    kept = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    if len(kept) < len(leaves):
        cause = f"it gives a {type(next(leaf for leaf in leaves if not isinstance(leaf, Tensor))).__name__} too"
        raise PlanError([Problem(path, cause, "Let it give a tensor, or a tuple of tensors")])
    return [leaves[place] for place in kept], kept, spec
