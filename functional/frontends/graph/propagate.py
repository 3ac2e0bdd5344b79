"""The axes of every tensor of a graph, and the operations that relate them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ....specs.paths import join, module_of
from ...model.linear import linear_of, overrides_forward
from ...types.relation import Operand, OperatorCall
from .export import RankGraph, module_path, operator_name, subgraphs
from .factors import Factor, block, size_of, unsplittable
from .related_axes import Axes, related_axes

if TYPE_CHECKING:
    from ....specs.tree import SpecTree
    from ...schedule import Schedule

GIVEN = "they are given to the model"
RETURNED = "the model returns them"
ELSEWHERE = "its weight is used outside of the module that holds it"


@frozen(eq=False)
class GraphTensor:
    """A tensor of the exported graph.

    Args:
        axes: The factors of its axes.
        is_trained: Whether it depends on a trained parameter.
        parameter: Path of the only tensor of the model that it is computed from, or is.
        is_given: Whether its entries are those of an input of the model.
        is_mask: Whether its entries are true or false.
    """

    axes: Axes
    is_trained: bool = False
    parameter: str = ""
    is_given: bool = False
    is_mask: bool = False


@frozen(eq=False)
class GraphOperation:
    """An operation of the graph.

    Args:
        node: Its node.
        name: The operator.
        module: Path of the module whose code runs it.
        inputs: The tensors that it takes.
        outputs: The tensors that it returns.
        weight: Path of the weight, if it is the product of a linear module with it.
    """

    node: fx.Node
    name: str
    module: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    weight: str = ""


@define(eq=False)
class ModelAxes:
    """The axes of a model's tensors, as its operations relate them.

    Args:
        model: The model.
        tree: Its tensors.
        operations: All operations, in order.
        tensors: The model's tensors that an operation reads, by canonical path.
        returned: The tensors that the model returns.
        names: Canonical path of each module, by its other paths.
    """

    model: nn.Module
    tree: SpecTree
    names: Mapping[str, str]
    operations: list[GraphOperation] = field(factory=list)
    tensors: dict[str, GraphTensor] = field(factory=dict)
    returned: list[GraphTensor] = field(factory=list)


def propagate(sch: Schedule, traced: RankGraph) -> ModelAxes:
    """Follow the axes of a schedule's model through its operations."""
    names = {alias: module.path for module in sch.modules for alias in module.aliases}
    found = ModelAxes(sch.runtime.model, sch.tree, names)
    values: dict[fx.Node, Any] = {}
    for node in traced.root.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(found, node, traced)
    found.returned = [
        tensor for tensor in _leaves(_walk(found, traced.root.graph, values)) if isinstance(tensor, GraphTensor)
    ]
    for tensor in found.returned:
        for axis in tensor.axes:
            block(axis, RETURNED)
    return found


def _placeholder(found: ModelAxes, node: fx.Node, traced: RankGraph) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    path = traced.paths.get(node.name, "")
    if not path:
        axes = tuple(unsplittable(size, GIVEN) for size in value.shape)
        return GraphTensor(axes, is_given=node.name in traced.inputs, is_mask=value.dtype == torch.bool)
    spec = found.tree[path]
    is_trained = spec.requires_grad and spec.kind == "parameter"
    if path not in found.tensors:
        axes = tuple((Factor(size),) if size != 1 else () for size in value.shape)
        found.tensors[path] = GraphTensor(axes, is_trained, path, is_mask=value.dtype == torch.bool)
    return found.tensors[path]


def _walk(found: ModelAxes, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    for node in graph.nodes:
        if node.op == "call_function":
            values[node] = _call(found, node, values)
        elif node.op == "output":
            return _with_values(node.args[0], values)
    return None


def _call(found: ModelAxes, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    for module, arguments in subgraphs(node):
        inner = [n for n in module.graph.nodes if n.op == "placeholder"]
        return _walk(found, module.graph, dict(zip(inner, _with_values(arguments, values), strict=True)))
    if node.target is operator.getitem:
        of, at = _with_values(node.args, values)
        return of[at]
    given = _given(node, values)
    inputs = tuple(tensor for tensor in _leaves(list(given.values())) if isinstance(tensor, GraphTensor))
    call = _operator_call(node, given)
    path = found.names.get(module_path(node), module_path(node))
    weight = _weight(found, call, given, path)
    if not call.shapes:
        return None
    made = related_axes(call, [tensor.axes for tensor in inputs], sums_parts=bool(weight))
    parameters = {tensor.parameter for tensor in inputs}
    common = GraphTensor(
        axes=(),
        is_trained=any(tensor.is_trained for tensor in inputs),
        parameter=parameters.pop() if len(parameters) == 1 else "",
        is_given=len(inputs) == 1 and inputs[0].is_given,
    )
    outputs = tuple(
        evolve(common, axes=axes, is_mask=isinstance(value, Tensor) and value.dtype == torch.bool)
        for axes, value in zip(made, _outputs(node), strict=True)
    )
    found.operations.append(GraphOperation(node, call.name, path, inputs, outputs, weight))
    return list(outputs) if isinstance(node.meta["val"], (list, tuple)) else outputs[0]


def _operator_call(node: fx.Node, given: Mapping[str, Any]) -> OperatorCall:
    """Return a call as the rules of operators see it."""
    operands: list[Operand] = []

    def met(value: Any) -> Any:
        if isinstance(value, GraphTensor):
            operands.append(Operand(len(operands), tuple(map(size_of, value.axes)), is_mask=value.is_mask))
            return operands[-1]
        return [met(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    arguments = {name: met(value) for name, value in given.items()}
    shapes = tuple(tuple(v.shape) if isinstance(v, Tensor) else () for v in _outputs(node))
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and bool(operands)
    return OperatorCall(operator_name(node), arguments, tuple(operands), shapes, is_pointwise)


def _weight(found: ModelAxes, call: OperatorCall, given: Mapping[str, Any], module: str) -> str:
    """Return the path of the weight in a product, if the weight belongs to the linear module whose code runs.

    A weight that other code uses must not be split, as that code bypasses the module's synchronisation.
    """
    name = {"linear": "weight", "addmm": "mat2", "mm": "mat2", "matmul": "other"}.get(call.name, "")
    tensor = given.get(name)
    owners = {module_of(path) for spec in [found.tree.get(_path_of(tensor))] if spec for path in spec.paths}
    is_own = False
    if isinstance(tensor, GraphTensor) and module in owners:
        owner = found.model.get_submodule(module)
        kind = linear_of(owner)
        is_own = kind is not None and not overrides_forward(owner) and _is_its_weight(found, tensor, module, call)
    if is_own:
        return _path_of(tensor)
    if call.name == "embedding":  # rows of a tied weight
        return ""
    for value in given.values():
        for other in _leaves([value]):
            if isinstance(other, GraphTensor) and other.parameter and _is_linear_weight(found, other):
                for axis in other.axes:
                    block(axis, ELSEWHERE)
    return ""


def _is_its_weight(found: ModelAxes, tensor: GraphTensor, module: str, call: OperatorCall) -> bool:
    kind = linear_of(found.model.get_submodule(module))
    spec = found.tree.get(join(module, "weight"))
    return kind is not None and spec is found.tree[tensor.parameter] and kind.out_axis == (call.name != "linear")


def _is_linear_weight(found: ModelAxes, tensor: GraphTensor) -> bool:
    """Tell whether a tensor is the weight of a linear module, itself and not a value computed from it."""
    paths = found.tree[tensor.parameter].paths
    modules = [found.model.get_submodule(module_of(path)) for path in paths]
    return (
        len(tensor.axes) > 1 and any(linear_of(m) is not None for m in modules) and tensor is found.tensors[tensor.parameter]
    )


def _path_of(value: object) -> str:
    return value.parameter if isinstance(value, GraphTensor) else ""


def _given(node: fx.Node, values: dict[fx.Node, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with defaults."""
    schema = getattr(node.target, "_schema", None)
    args, kwargs = _with_values(node.args, values), _with_values(node.kwargs, values)
    if schema is None:
        return {**{str(at): value for at, value in enumerate(args)}, **kwargs}
    given = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}  # in the schema's order
    return {**given, **{a.name: value for a, value in zip(schema.arguments, args, strict=False)}, **kwargs}


def _with_values(arguments: Any, values: dict[fx.Node, Any]) -> Any:
    return map_aggregate(arguments, lambda n: values.get(n) if isinstance(n, fx.Node) else n)


def _outputs(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, Mapping):
        yield from _leaves(list(value.values()))
    else:
        yield value
