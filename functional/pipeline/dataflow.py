"""The data flow of an exported graph: the stage of each operation, its dependences, and the memory that values share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, frozen
from torch import SymBool, SymFloat, SymInt, Tensor, fx

from ...specs.errors import Problem

if TYPE_CHECKING:
    from ...specs.tree import SpecTree
    from .export import Captured

_NUMBERS = (int, float, bool, SymInt, SymFloat, SymBool)
_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int)
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)
_STATISTICS, _NORM_TRAINS = (3, 4), 5
"""Argument places of the running statistics, which these write though their schema does not say so, and of the flag."""

_CHECKS = ("_assert", "sym_constrain")
"""Prefixes of operators that only check assumptions of the export."""


@frozen(eq=False)
class DataFlow:
    """A captured graph, cut into stages.

    Args:
        captured: The graph.
        tree: The model's tensors.
        cuts: The modules after which a stage ends, in the order in which they end.
        stage: The stage in which the model's code runs each operation.
    """

    captured: Captured
    tree: SpecTree
    cuts: tuple[str, ...]
    stage: dict[fx.Node, int]

    @property
    def num_stages(self) -> int:
        """Stages: one more than cuts."""
        return len(self.cuts) + 1

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Place of each node in the graph."""
        return {node: place for place, node in enumerate(self.captured.graph.nodes)}

    @cached_property
    def inputs(self) -> list[fx.Node]:
        """The model's inputs that are tensors."""
        return [n for n in self.captured.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]

    @cached_property
    def outputs(self) -> list[Any]:
        """The leaves of the model's return value: nodes, and plain values."""
        (output,) = self.captured.graph.find_nodes(op="output")
        return list(output.args[0])

    def held(self, node: fx.Node) -> str | None:
        """Return the path of the model's tensor that a node reads, None if it reads none."""
        return str(node.target) if node.op == "get_attr" and str(node.target) in self.tree else None

    def is_free(self, node: fx.Node) -> bool:
        """Tell whether every stage has a value without computing it: a constant, or a tensor of the model."""
        return node.op == "get_attr"

    @cached_property
    def fixed(self) -> set[fx.Node]:
        """The operations that run in their own stage only: they depend on parameters, draw, write, or are opaque."""
        written = {self.memory.find(target) for node in self.stage for target in written_by(node)}
        fixed: set[fx.Node] = set()
        for node in self.captured.graph.nodes:
            path = self.held(node)
            if path is not None:
                is_fixed = self.tree[path].kind == "parameter" or self.memory.find(node) in written
            elif node in self.stage:
                is_fixed = (
                    any(arg in fixed for arg in node.all_input_nodes)
                    or self.memory.find(node) in written
                    or is_random(node)
                    or _library(node) == "shardplan"
                )
            else:
                is_fixed = False
            if is_fixed:
                fixed.add(node)
        return fixed

    @cached_property
    def needs_gradient(self) -> set[fx.Node]:
        """The floating-point values that depend on a trained tensor."""
        needing: set[fx.Node] = set()
        for node in self.captured.graph.nodes:
            path = self.held(node)
            if path is not None:
                needs = self.tree[path].requires_grad and self.tree[path].kind == "parameter"
            else:
                needs = any(arg in needing for arg in node.all_input_nodes) and not _stops_gradients(node)
                if isinstance(value := node.meta.get("val"), Tensor):
                    needs = needs and (value.is_floating_point() or value.is_complex())
                elif is_size(node):
                    needs = False
            if needs:
                needing.add(node)
        return needing

    @cached_property
    def memory(self) -> _SharedMemory:
        """The values that share memory."""
        return shared_memory(self.captured.graph)

    def needed(
        self, stage: int, outputs: Iterable[Any], enters: Callable[[fx.Node], bool]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the operations that a stage has to run, and the values that it starts from, each in order.

        Args:
            stage: The stage; it also runs its own draws, and its writes into tensors of the model or of these operations.
            outputs: Its outputs.
            enters: Tells whether the stage computes a value, rather than starts from it.
        """
        own = [node for node, at in self.stage.items() if at == stage]
        inside: set[fx.Node] = set()
        outside: set[fx.Node] = set()

        def reach(nodes: Iterable[fx.Node]) -> None:
            todo = list(nodes)
            while todo:
                node = todo.pop()
                if node in inside or node in outside or self.is_free(node) or is_size(node):
                    continue
                if enters(node):
                    inside.add(node)
                    todo += node.all_input_nodes
                else:
                    outside.add(node)

        reach(output for output in outputs if isinstance(output, fx.Node))
        reach(node for node in own if is_random(node))
        held = {self.memory.find(node) for node in self.captured.graph.nodes if self.held(node) is not None}
        while True:
            touched = held | {self.memory.find(node) for node in inside | outside}
            writers = [n for n in own if n not in inside and any(self.memory.find(w) in touched for w in written_by(n))]
            if not writers:
                return sorted(inside, key=self.order.__getitem__), sorted(outside, key=self.order.__getitem__)
            reach(writers)

    def torn(self) -> Iterator[Problem]:
        """Iterate over the problems of memory that a stage writes and that a value of another stage shares."""
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.captured.graph.nodes:
            if node in self.stage or self.held(node) is not None:
                members.setdefault(self.memory.find(node), []).append(node)
        for node, stage in self.stage.items():
            for target in written_by(node):
                group = members.get(self.memory.find(target), [])
                early = [member for member in group if self.stage.get(member, stage) < stage]
                readers = {
                    self.stage[user] for member in group if self.held(member) for user in member.users if user in self.stage
                }
                if sharing := sorted({self.stage[member] for member in early} | readers - {stage}):
                    where = ", ".join(f"stage {number}" for number in sharing)
                    cause = f"{node.target} writes in stage {stage} what {where} holds too, and they do not share memory"
                    yield Problem(module_path(node), cause, "Cut before or after both, or write a new tensor")


@define
class _SharedMemory:
    """Values that are views of each other, as disjoint sets."""

    parent: dict[fx.Node, fx.Node] = Factory(dict)

    def find(self, node: fx.Node) -> fx.Node:
        while (up := self.parent.get(node, node)) is not node:
            node = up
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self.parent[self.find(a)] = self.find(b)


def shared_memory(graph: fx.Graph) -> _SharedMemory:
    """Return the values of a graph that share memory, as disjoint sets."""
    memory = _SharedMemory()
    for node in graph.nodes:
        for arg in _shared_by(node):
            memory.join(node, arg)
    return memory


def read_flow(captured: Captured, tree: SpecTree, cuts: Sequence[str]) -> tuple[DataFlow, list[Problem]]:
    """Assign each operation to a stage: the number of cut modules that have ended before it.

    Args:
        captured: The graph.
        tree: The model's tensors.
        cuts: The modules after which a stage ends, in any order.
    """
    nodes = [n for n in captured.graph.nodes if n.op == "call_function" and not is_size(n) and not is_check(n)]
    last: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for path in _module_paths(node):
            last[path] = place
    problems = [problem for path in cuts if (problem := _wrong_cut(captured, path, last))]
    ends = sorted((last[path], path) for path in cuts if path in last)
    for (end, path), (next_end, other) in pairwise(ends):
        if end == next_end:
            problems.append(Problem(other, f"it ends where {path!r} ends, and both are cut there", "Cut one of them"))
    if ends and ends[-1][0] == len(nodes) - 1:
        problems.append(Problem(ends[-1][1], "nothing runs after it, and a stage would be empty", "Cut an earlier module"))
    stage: dict[fx.Node, int] = {}
    current = 0
    for place, node in enumerate(nodes):
        stage[node] = current
        if node.target is operator.getitem and (source := node.all_input_nodes[0]) in stage:
            stage[node] = stage[source]  # an item of a result belongs to its operator
        while current < len(ends) and ends[current][0] <= place:
            current += 1
    return DataFlow(captured, tree, tuple(path for _, path in ends), stage), problems


def _wrong_cut(captured: Captured, path: str, last: dict[str, int]) -> Problem | None:
    num_calls = captured.num_calls.get(path, 0)
    if num_calls > 1:
        return Problem(
            path, f"it is called {num_calls} times, so that it ends in {num_calls} places", "Cut a module around it"
        )
    if num_calls == 0:
        return Problem(path, "it is never called, so that no stage can end after it", "Cut a module that runs")
    if path not in last:
        cause = "nothing is computed in it, or in a region without gradients or under autocast, which is one operation"
        return Problem(path, f"no stage can end after it: {cause}", "Cut the module before or around it")
    return None


def is_size(node: fx.Node) -> bool:
    """Tell whether a node is a size of a tensor, or a number computed from sizes, which every stage finds itself."""
    if not isinstance(node.meta.get("val"), _NUMBERS) or node.op != "call_function":
        return False
    return node.target in _SIZES or all(map(is_size, node.all_input_nodes))


def is_check(node: fx.Node) -> bool:
    """Tell whether a node only checks an assumption of the export."""
    return getattr(node.target, "__name__", "").startswith(_CHECKS)


def is_random(node: fx.Node) -> bool:
    """Tell whether a node draws random numbers, itself or in the region that it runs."""
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return draws or any(is_random(inner) for _, region in _region(node) for inner in region.graph.nodes)


def is_sendable(node: fx.Node) -> bool:
    """Tell whether a node is a single tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that runs a node."""
    return next(iter(reversed(list(_module_paths(node)))), "")


def written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Iterate over the values that a node writes in place, itself or in the region that it runs."""
    for schema, value in _arguments(node):
        if schema.alias_info is not None and schema.alias_info.is_write:
            yield from _nodes(value)
    for place in _STATISTICS if node.target in _NORMS and node.args[_NORM_TRAINS] else ():
        yield from _nodes(node.args[place])
    for operands, region in _region(node):
        inputs = dict(zip(region.graph.find_nodes(op="placeholder"), operands, strict=False))
        memory = shared_memory(region.graph)
        written = {memory.find(target) for inner in region.graph.nodes for target in written_by(inner)}
        yield from (operand for inner, operand in inputs.items() if memory.find(inner) in written)


def _region(node: fx.Node) -> Iterator[tuple[list[fx.Node], fx.GraphModule]]:
    """Iterate over the regions that a node runs as a single operation, each after its arguments."""
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)] if node.op == "call_function" else []
    for place, operand in enumerate(operands):
        root: Any = node.graph.owning_module
        region = getattr(root, str(operand.target), None) if operand.op == "get_attr" and root is not None else None
        if isinstance(region, fx.GraphModule):
            yield operands[place + 1 :], region


def _shared_by(node: fx.Node) -> Iterator[fx.Node]:
    if node.target is operator.getitem:
        yield from node.all_input_nodes
    for schema, value in _arguments(node):
        if schema.alias_info is not None:
            yield from _nodes(value)


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        for place, argument in enumerate(schema.arguments):
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            yield argument, value


def _nodes(value: Any) -> Iterable[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _library(node: fx.Node) -> str:
    return getattr(node.target, "namespace", "")


def _stops_gradients(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    no_gradients = name == "wrap_with_set_grad_enabled" and node.args[0] is False
    return no_gradients or name.startswith(("detach", "rand", "zeros_like", "ones_like", "full_like", "empty_like", "new_"))


def _module_paths(node: fx.Node) -> Iterator[str]:
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        yield path
