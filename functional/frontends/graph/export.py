"""A model's operations in the order in which its code runs them, exported on fake tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from ...layout.local_model import LocalModel, quiet
from ...model.open_modules import OpenModules
from ...model.rng_state import own_generators


@frozen(eq=False)
class RankGraph:
    """The operations that one rank runs.

    Args:
        root: The graph, with its subgraphs.
        paths: Canonical path of each of the model's tensors, by the name of the node that stands for it.
        inputs: Names of the nodes that stand for the model's inputs.
        training: Whether it runs as it does in training.
    """

    root: fx.GraphModule
    paths: Mapping[str, str]
    inputs: frozenset[str]
    training: bool


@frozen
class ExportFailure:
    """An export that raised an error.

    Args:
        path: The module that was running.
        cause: Type and first line of the error.
    """

    path: str
    cause: str


def export_rank(subject: LocalModel, *, training: bool) -> RankGraph | ExportFailure:
    """Export the operations of the first rank, in training or in evaluation."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    local = subject.fake_copy(mode, named=True)
    local.train(training)
    running = OpenModules()
    running.follow(local)
    local.forward = _tensors_only(local.forward)
    with mode:
        inputs = subject.fake_inputs()
    try:
        with mode, own_generators(0), torch.no_grad(), quiet():
            exported: Any = torch.export.export(local, (), inputs, strict=False)
    except Exception as error:  # noqa: BLE001  the model's code may raise anything, which is reported
        lines = str(error).strip().splitlines()
        return ExportFailure(running.innermost, f"{type(error).__name__}: {lines[0] if lines else ''}")
    paths: dict[str, str] = {}
    given: set[str] = set()
    for spec in exported.graph_signature.input_specs:
        if spec.target is not None and spec.target in subject.tree:
            paths[spec.arg.name] = subject.tree[spec.target].path
        elif spec.kind is InputKind.USER_INPUT:
            given.add(spec.arg.name)
    return RankGraph(exported.graph_module, paths, frozenset(given), training)


def subgraphs(node: fx.Node) -> Iterator[tuple[fx.GraphModule, Sequence[Any]]]:
    """Iterate over the subgraphs that a node runs, with their arguments: code under ``torch.no_grad`` and the like."""
    for at, argument in enumerate(node.args):
        if isinstance(argument, fx.Node) and argument.op == "get_attr" and isinstance(argument.target, str):
            found = getattr(node.graph.owning_module, argument.target, None)
            if isinstance(found, fx.GraphModule):
                yield found, node.args[at + 1 :]


def operations(graph: fx.Graph) -> Iterator[fx.Node]:
    """Iterate over all operations, also of subgraphs."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inner = list(subgraphs(node))
        for found, _ in inner:
            yield from operations(found.graph)
        if not inner:
            yield node


def module_path(node: fx.Node) -> str:
    """Return the path of the module whose code runs an operation."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def operator_name(node: fx.Node) -> str:
    """Return the name of an operator, without its overload: ``add``, ``softmax``."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else getattr(node.target, "__name__", str(node.target))


def _tensors_only(forward: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """Let a model return its tensors alone, without a cache, for example, which an export does not take."""

    @functools.wraps(forward)
    def tensors(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [value for value in tree_leaves(forward(*args, **kwargs)) if isinstance(value, Tensor)]

    return tensors
