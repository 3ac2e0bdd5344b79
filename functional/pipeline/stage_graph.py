"""Build the graph of a stage: its own operations, and values computed again. The digest of a stage is taken of its text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, frozen
from torch import Tensor, fx, nn

from ...specs.paths import module_of
from ..model.copy import get_tensor
from .dataflow import DataFlow, is_size, module_path
from .opaque_calls import FunctionCall, LeafCall, is_opaque, tensors_of

if TYPE_CHECKING:
    from .export import Captured

CONSTANTS, FUNCTIONS = "_constants", "_functions"
"""Submodules of a stage for constants and functions, which the model has not."""

_TENSORS_OF = "shardplan.functional.opaque.tensors_of"
"""Name of ``tensors_of`` in the digests of saved plans, wherever the function is."""


class UnknownSizeError(ValueError):
    """A stage needs a size that none of its inputs shows."""


@frozen
class StageGraph:
    """The graph of a stage in training, or in evaluation.

    Args:
        graph: The graph, from the stage's inputs to a tuple. Tensors have the paths by which the stage's modules name them.
        kept: Constants and regions that the graph refers to, by name.
        functions: The user's functions that the graph calls, by name.
        text: The computation as text that is the same in every process.
    """

    graph: fx.Graph
    kept: dict[str, Tensor | nn.Module]
    functions: dict[str, FunctionCall]
    text: str


def build_stage_graph(
    flow: DataFlow, stage: int, mode: str, inputs: Sequence[fx.Node], outputs: Sequence[Any]
) -> StageGraph:
    """Return the graph of a stage.

    Args:
        flow: The whole graph.
        stage: Number of the stage.
        mode: Name of the mode in which the graph was captured.
        inputs: The stage's inputs, in order.
        outputs: The stage's outputs, in order: nodes, or plain values.

    Raises:
        UnknownSizeError: If the stage needs a size that its inputs do not show.
    """
    builder = _Builder(flow, stage, mode, list(inputs))
    return builder.build(outputs)


@define
class _Builder:
    flow: DataFlow
    stage: int
    mode: str
    inputs: list[fx.Node]
    graph: fx.Graph = Factory(fx.Graph)
    made: dict[fx.Node, fx.Node] = Factory(dict)
    held: dict[str, fx.Node] = Factory(dict)
    sizes: dict[object, fx.Node] = Factory(dict)
    kept: dict[str, Tensor | nn.Module] = Factory(dict)
    functions: dict[str, FunctionCall] = Factory(dict)

    @property
    def captured(self) -> Captured:
        return self.flow.captured

    def build(self, outputs: Sequence[Any]) -> StageGraph:
        for node in self.inputs:
            self.made[node] = self.graph.placeholder(node.name)
            self.made[node].meta["val"] = node.meta["val"]
        needed, _ = self.flow.needed(self.stage, outputs, lambda node: node not in self.made)
        for node in needed:
            self.made[node] = self._copy(node)
        self.graph.output(tuple(self._value(output, None) for output in outputs))
        self.graph.lint()
        return StageGraph(self.graph, self.kept, self.functions, "\n".join(_lines(self.graph, self.kept, self.functions)))

    def _copy(self, node: fx.Node) -> fx.Node:
        if is_opaque(node):
            return self._call(node)
        copied = self.graph.create_node(
            node.op,
            node.target,
            tuple(self._value(arg, node) for arg in node.args),
            {name: self._value(arg, node) for name, arg in node.kwargs.items()},
            name=node.name,
        )
        copied.meta["val"] = node.meta.get("val")
        return copied

    def _call(self, node: fx.Node) -> fx.Node:
        """Put an opaque call itself in the place of its placeholder."""
        tensors, number = node.args
        call = self.captured.calls[number]  # type: ignore[index]
        values = [self._value(tensor, node) for tensor in tensors]  # type: ignore[union-attr]
        args, kwargs = call.fill(values)
        if isinstance(call.callee, LeafCall):
            target = call.callee.path
        else:
            target = f"{FUNCTIONS}.{self.mode}_{number}"
            self.functions[target] = call.callee
        returned = self.graph.create_node("call_module", target, args, kwargs, name=node.name)
        return self.graph.call_function(tensors_of, (returned, call.kept))

    def _value(self, value: Any, user: fx.Node | None) -> Any:
        return fx.map_arg(value, lambda node: self._of(node, user))

    def _of(self, node: fx.Node, user: fx.Node | None) -> fx.Node:
        if node in self.made:
            return self.made[node]
        if node.op == "get_attr":
            return self._held(node, user)
        assert is_size(node), f"{node} is neither sent nor computed in stage {self.stage}"
        made = self.made[node] = self._size(node)
        return made

    def _held(self, node: fx.Node, user: fx.Node | None) -> fx.Node:
        path = self.flow.held(node)
        if path is None:
            name = f"{CONSTANTS}.{self.mode}_{str(node.target).replace('.', '_')}"
            self.kept[name] = get_tensor(self.captured.root, str(node.target))
        else:
            name = self._path_here(path, user)
        if name not in self.held:
            at = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            with self.graph.inserting_before(at) if at else self.graph.inserting_after(None):
                self.held[name] = self.graph.create_node("get_attr", name)
            self.held[name].meta["val"] = node.meta.get("val")
        return self.held[name]

    def _path_here(self, path: str, user: fx.Node | None) -> str:
        """Return the path of a tied tensor nearest to the module that uses it."""
        paths = self.flow.tree[path].paths
        if user is None or len(paths) == 1:
            return path
        around = module_path(user)
        fits = [p for p in paths if f"{around}.".startswith(f"{module_of(p)}.") or not module_of(p)]
        return max(fits, key=lambda p: len(module_of(p)), default=path)

    def _size(self, node: fx.Node) -> fx.Node:
        """Find a size on a tensor that the stage has, or compute it from such sizes."""
        value = node.meta["val"]
        if _expression(value) in self.sizes:
            return self.sizes[_expression(value)]
        for source, made in list(self.made.items()):
            tensor = source.meta.get("val")
            for axis, size in enumerate(tensor.shape) if isinstance(tensor, Tensor) else ():
                if _expression(size) == _expression(value):
                    found = self.graph.call_function(torch.ops.aten.sym_size.int, (made, axis))
                    found.meta["val"] = value
                    self.sizes[_expression(value)] = found
                    return found
        if all(arg in self.made or is_size(arg) for arg in node.all_input_nodes):
            return self._copy(node)
        msg = f"it needs the size {value}, and nothing that it is sent shows it"
        raise UnknownSizeError(msg)


def tensors_held(flow: DataFlow, graph: StageGraph) -> Iterator[str]:
    """Iterate over the paths of the model's tensors in a stage's graph and in its leaves."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and str(node.target) in flow.tree:
            yield str(node.target)
        elif node.op == "call_module" and not str(node.target).startswith(FUNCTIONS):
            prefix = f"{node.target}."
            yield from (path for path in flow.tree.all_paths if path.startswith(prefix))


def _expression(size: Any) -> object:
    return size.node.expr if hasattr(size, "node") else size


def _lines(graph: fx.Graph, kept: dict[str, Tensor | nn.Module], functions: dict[str, FunctionCall]) -> Iterator[str]:
    """Iterate over the lines of a graph's text, which has no names of nodes or symbols, and nothing of the process."""
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        numbers[node] = len(numbers)
        target = _target(node, kept, functions)
        args = ", ".join(
            [*(_word(a, numbers) for a in node.args), *(f"{k}={_word(v, numbers)}" for k, v in node.kwargs.items())]
        )
        yield f"%{numbers[node]} {node.op} {target}({args}) {_type(node.meta.get('val'))}"


def _target(node: fx.Node, kept: dict[str, Tensor | nn.Module], functions: dict[str, FunctionCall]) -> str:
    match node.op:
        case "placeholder":
            return ""
        case "get_attr" if str(node.target) in kept:
            return _contents(kept[str(node.target)])
        case "call_module" if str(node.target) in functions:
            return str(functions[str(node.target)])
        case "call_function" if node.target is tensors_of:
            return _TENSORS_OF
        case "call_function":
            return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else _name(node.target)  # noqa: SLF001
        case _:
            return str(node.target)


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', type(function).__name__)}"


def _contents(kept: Tensor | nn.Module) -> str:
    if isinstance(kept, fx.GraphModule):
        return "{" + "; ".join(_lines(kept.graph, {}, {})) + "}"
    if isinstance(kept, Tensor):
        data = kept.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"constant {kept.dtype} {list(kept.shape)} {hashlib.sha256(data).hexdigest()}"
    return type(kept).__qualname__


def _word(value: Any, numbers: dict[fx.Node, int]) -> str:
    match value:
        case fx.Node():
            return f"%{numbers[value]}"
        case list() | tuple():
            return f"[{', '.join(_word(item, numbers) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_word(item, numbers)}' for key, item in value.items())}}}"
        case slice():
            return f"slice({', '.join(_word(item, numbers) for item in (value.start, value.stop, value.step))})"
        case _:
            return str(value) if isinstance(value, torch.device | torch.dtype | torch.layout) else repr(value)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = (str(size) if isinstance(size, int) else "?" for size in value.shape)
        return f"{value.dtype}[{', '.join(sizes)}]"
    return ""
