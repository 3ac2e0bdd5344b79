"""A stage as a module: the tensors under their paths, and the stage's graphs as its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from ...specs.pipeline import holds
from ..model.callables import find_callable
from ..model.copy import get_tensor
from .dataflow import is_check
from .stage_graph import FUNCTIONS

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from ...specs.pipeline import Activation, Pipeline, VariableSize
    from ..layout.apply import Local
    from ..layout.collectives import SyncGroup
    from .partition import StageCode
    from .stage_graph import StageGraph


@frozen(eq=False)
class StageFacts:
    """What is known of a stage besides its modules and tensors.

    Args:
        number: Which stage it is.
        pipeline: All stages, in the plan.
        unused: Paths of the tensors that it holds, and no operation reads in training.
        returns: For the last stage, how what the model returns is put together; None for others.
        forwards: Its forward in training (True) and in evaluation (False).
    """

    number: int
    pipeline: Pipeline
    unused: tuple[str, ...]
    returns: Mapping[bool, TreeSpec] | None
    forwards: Mapping[bool, Callable[..., Any]]


class StageModule(nn.Module):
    """One pipeline stage of a model.

    It takes what the stage before gives, as positional arguments in the plan's order; the first stage takes the model's
    inputs. It returns a tuple in the plan's order; the last stage returns what the model returns. Parameters, buffers and
    leaves stand under the paths that they have in the model. ``train()`` and ``eval()`` work as they do for the model.

    Args:
        number: Which stage it is.
        pipeline: All stages, in the plan.
        code: What it computes.
        model: Has the stage's tensors, and its leaves.
        paths: Paths of the tensors that it holds.
        local: The rank that it is for.
        device: Where its tensors are.
    """

    def __init__(
        self,
        number: int,
        pipeline: Pipeline,
        code: StageCode,
        model: nn.Module,
        paths: Sequence[str],
        local: Local,
        *,
        device: torch.device,
    ) -> None:
        super().__init__()
        for path in _leaves(code):
            _place(self, path, model.get_submodule(path))
        for path in paths:
            if not any(path.startswith(f"{leaf}.") for leaf in _leaves(code)):
                _place_tensor(self, path, model)
        forwards = {training: _compile(self, graph, number, local, device) for training, graph in code.graphs.items()}
        self._shardplan = StageFacts(number, pipeline, tuple(_unused(code, paths, model)), code.returns, forwards)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the stage on what the one before gave, or on the model's inputs."""
        facts = facts_of(self)
        check_inputs(facts.number, facts.pipeline, inputs)
        outputs = facts.forwards[self.training](self, *inputs)
        if facts.returns is not None:
            return tree_unflatten(outputs, facts.returns[self.training])
        return tuple(output.contiguous() for output in outputs)  # no runtime sends others

    def extra_repr(self) -> str:
        """Say what it takes and gives."""
        facts = facts_of(self)
        stage = facts.pipeline.stages[facts.number]
        inputs, outputs = (", ".join(map(str, side)) for side in (stage.inputs, stage.outputs))
        return f"stage {facts.number}: ({inputs}) -> ({outputs})"


def facts_of(stage: nn.Module) -> StageFacts:
    """Return what is known of a stage."""
    facts: Any = stage._shardplan  # noqa: SLF001  the one name that a stage adds to those of the model
    return facts


def check_inputs(number: int, pipeline: Pipeline, inputs: tuple[Tensor, ...]) -> None:
    """Compare what a stage is called with to what the plan says.

    Raises:
        TypeError: If they are not as many tensors.
        ValueError: If a size is another one than the plan's, or sizes of one name differ.
    """
    stage = pipeline.stages[number]
    if len(inputs) != len(stage.inputs):
        msg = f"stage {number} takes {len(stage.inputs)} tensors, not {len(inputs)}: {', '.join(map(str, stage.inputs))}"
        raise TypeError(msg)
    if pipeline.chain:
        return  # its modules run as they are
    sizes: dict[str, int] = {}
    wrong = [
        text
        for expected, tensor in zip(stage.inputs, inputs, strict=True)
        for text in _wrong_axes(expected, tuple(tensor.shape), sizes)
    ]
    wrong += [text for size in pipeline.sizes for text in _out_of_range(size, sizes.get(size.name, size.example))]
    known = {size.name: sizes.get(size.name, size.example) for size in pipeline.sizes}
    if not wrong and number == 0:
        given = ", ".join(f"{name} is {size}" for name, size in known.items())
        away = "else the model's code goes another way than with the example inputs"
        wrong = [f"{given}, and the plan is for {c}: {away}" for c in pipeline.conditions if not holds(c, known)]
    if wrong:
        msg = f"stage {number}: {'; '.join(wrong)}"
        raise ValueError(msg)


def _wrong_axes(expected: Activation, shape: tuple[int, ...], sizes: dict[str, int]) -> Iterator[str]:
    if len(shape) != len(expected.shape):
        yield f"{expected} is given with shape {list(shape)}"
        return
    for axis, (planned, size) in enumerate(zip(expected.shape, shape, strict=True)):
        if isinstance(planned, int) and size != planned:
            fixed = f"the model's code fixes it at the {planned} of the example inputs"
            yield f"axis {axis} of {expected} is {size}, and {fixed}; plan again with {size}"
        elif isinstance(planned, str) and sizes.setdefault(planned, size) != size:
            yield f"axis {axis} of {expected} is {size}, and {planned} is {sizes[planned]} before"


def _out_of_range(size: VariableSize, given: int) -> Iterator[str]:
    if given < size.least or (size.most is not None and given > size.most):
        sizes = f"{size.least} or more" if size.most is None else f"{size.least} to {size.most}"
        yield (
            f"{size.name} is {given}, and the plan is for {sizes}: with others the model's code goes another way than with"
            f" the {size.example} of the example inputs"
        )


def _unused(code: StageCode, paths: Sequence[str], model: nn.Module) -> Iterator[str]:
    """Iterate over the paths of tensors that no operation of the stage reads in training, under any path."""
    named = {str(node.target) for node in code.graphs[True].graph.nodes if node.op == "get_attr"}
    leaves = tuple(f"{leaf}." for leaf in _leaves(code))
    read = {id(get_tensor(model, path)) for path in paths if path in named or path.startswith(leaves)}
    return (path for path in paths if id(get_tensor(model, path)) not in read)


def _leaves(code: StageCode) -> list[str]:
    found = {
        str(node.target): None
        for graph in code.graphs.values()
        for node in graph.graph.nodes
        if node.op == "call_module" and not str(node.target).startswith(FUNCTIONS)
    }
    return list(found)


def _place(root: nn.Module, path: str, value: nn.Module) -> None:
    owner, name = _owner(root, path)
    owner.add_module(name, value)


def _place_tensor(root: nn.Module, path: str, model: nn.Module) -> None:
    owner, name = _owner(root, path)
    source = model.get_submodule(path.rpartition(".")[0])
    tensor = get_tensor(model, path)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor, persistent=name not in source._non_persistent_buffers_set)  # noqa: SLF001


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *names, last = path.split(".")
    for name in names:
        if name not in root._modules:  # noqa: SLF001
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root, last


def _compile(stage: StageModule, graph: StageGraph, number: int, local: Local, device: torch.device) -> Callable[..., Any]:
    """Return the forward of a graph for one rank: its own place, groups and device in the operators that name one."""
    for name, kept in graph.kept.items():
        owner, last = _owner(stage, name)
        if isinstance(kept, Tensor):
            owner.register_buffer(last, kept.to(device), persistent=False)
        else:
            owner.add_module(last, _moved(kept, device))
    for name, call in graph.functions.items():
        _place(stage, name, _Function(find_callable(call.name, local.callables), local.groups[call.mesh_axis]))
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in copied.nodes:
        if getattr(node.target, "namespace", "") == "shardplan":
            _address(node, local.groups)
    _move(copied, device)
    compiled = fx.GraphModule(stage, copied, class_name=f"Stage{number}")
    return type(compiled).forward


def _moved(kept: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a region of the graph for a device, and of the regions in it."""
    assert isinstance(kept, fx.GraphModule), "what a graph keeps besides tensors is a region"
    moved = fx.GraphModule(kept, fx.Graph())
    moved.graph.output(moved.graph.graph_copy(kept.graph, {}))
    for name, inner in kept.named_children():
        moved.add_module(name, _moved(inner, device))
    _move(moved.graph, device)
    moved.recompile()
    return moved


def _move(graph: fx.Graph, device: torch.device) -> None:
    """Exchange the device on which the model was exported, and leave out checks of what the export has assumed."""
    for node in list(graph.nodes):
        if is_check(node) and not node.users:
            graph.erase_node(node)
            continue
        node.args = _on_device(node.args, device)
        node.kwargs = _on_device(node.kwargs, device)
        if getattr(node.target, "__name__", "") == "wrap_with_autocast":
            node.args = (device.type, *node.args[1:])


def _address(node: fx.Node, groups: Mapping[Any, SyncGroup]) -> None:
    """Give a collective operator the group and the place of this rank, where the plan has a mesh axis."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # noqa: SLF001
    values = dict(zip(names, node.args, strict=False)) | node.kwargs
    mesh_axis: Any = values["group"]
    assert mesh_axis in groups, "an exported operator names its mesh axis, or a group of neighbours along it"
    values["group"] = groups[mesh_axis].name
    if "index" in values:
        values["index"] = groups[mesh_axis].index
    node.args, node.kwargs = tuple(values[name] for name in names), {}


def _on_device(value: Any, device: torch.device) -> Any:
    """Exchange the device on which the model was exported."""
    match value:
        case torch.device(type="cpu"):
            return device
        case tuple() | list():
            return type(value)(_on_device(item, device) for item in value)
        case dict():
            return {key: _on_device(item, device) for key, item in value.items()}
        case _:
            return value


class _Function(nn.Module):
    """A user's synchronisation, bound to its group."""

    def __init__(self, function: Callable[..., Any], group: SyncGroup) -> None:
        super().__init__()
        self._function, self._group = function, group

    def forward(self, x: Tensor) -> Any:
        return self._function(x, self._group)
