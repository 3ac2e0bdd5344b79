"""A stage as a module: its tensors under their paths in the model, and the stage's graphs as its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from ...specs.paths import module_of
from ...specs.pipeline import holds
from ..model.callables import find_callable
from ..model.copy import get_tensor
from .dataflow import is_check
from .stage_graph import FUNCTIONS

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from ...specs.pipeline import Activation, Pipeline, VariableSize
    from ..layout.apply import RankContext
    from ..layout.collectives import SyncGroup
    from .partition import StageCode
    from .stage_graph import StageGraph


@frozen(eq=False)
class StageFacts:
    """The attributes of a stage module besides its submodules and tensors.

    Args:
        number: Number of the stage.
        pipeline: The plan's pipeline.
        unused: Paths of the tensors of the stage that no operation reads in training.
        returns: For the last stage, the pytree structure of the model's return value in either mode; else None.
        forwards: Its forward in training (True) and in evaluation (False).
    """

    number: int
    pipeline: Pipeline
    unused: tuple[str, ...]
    returns: Mapping[bool, TreeSpec] | None
    forwards: Mapping[bool, Callable[..., Any]]


class StageModule(nn.Module):
    """A pipeline stage of a model.

    Its arguments are the outputs of the stage before, in the plan's order; for the first stage, the model's inputs. It
    returns a tuple in the plan's order; the last stage returns the return value of the model. Parameters, buffers and leaves
    have the paths that they have in the model. ``train()`` and ``eval()`` work as they do for the model.

    Args:
        number: Number of the stage.
        pipeline: The plan's pipeline.
        code: The graphs of the stage.
        model: The model with the stage's tensors and leaves.
        paths: Paths of the stage's tensors.
        rank: The rank that runs the stage.
        device: Device of its tensors.
    """

    def __init__(
        self,
        number: int,
        pipeline: Pipeline,
        code: StageCode,
        model: nn.Module,
        paths: Sequence[str],
        rank: RankContext,
        *,
        device: torch.device,
    ) -> None:
        super().__init__()
        for path in _leaves(code):
            _put_module(self, path, model.get_submodule(path))
        for path in paths:
            if not any(path.startswith(f"{leaf}.") for leaf in _leaves(code)):
                _put_tensor(self, path, model)
        forwards = {training: _compile(self, graph, number, rank, device) for training, graph in code.graphs.items()}
        self._shardplan = StageFacts(number, pipeline, tuple(_unused(code, paths, model)), code.returns, forwards)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the stage on the outputs of the stage before, or on the model's inputs."""
        facts = facts_of(self)
        check_inputs(facts.number, facts.pipeline, inputs)
        outputs = facts.forwards[self.training](self, *inputs)
        if facts.returns is not None:
            return tree_unflatten(outputs, facts.returns[self.training])
        return tuple(output.contiguous() for output in outputs)  # runtimes send contiguous tensors only

    def extra_repr(self) -> str:
        """Show its inputs and outputs."""
        facts = facts_of(self)
        stage = facts.pipeline.stages[facts.number]
        inputs, outputs = (", ".join(map(str, side)) for side in (stage.inputs, stage.outputs))
        return f"stage {facts.number}: ({inputs}) -> ({outputs})"


def facts_of(stage: nn.Module) -> StageFacts:
    """Return the attributes of a stage module."""
    facts: Any = stage._shardplan  # noqa: SLF001  the only name that a stage adds to the model's names
    return facts


def check_inputs(number: int, pipeline: Pipeline, inputs: tuple[Tensor, ...]) -> None:
    """Compare the arguments of a stage with its inputs in the plan.

    Raises:
        TypeError: If the number of tensors differs.
        ValueError: If a size differs from the plan's, or sizes of the same name differ.
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


def _put_module(root: nn.Module, path: str, value: nn.Module) -> None:
    owner, name = _owner(root, path)
    owner.add_module(name, value)


def _put_tensor(root: nn.Module, path: str, model: nn.Module) -> None:
    owner, name = _owner(root, path)
    source = model.get_submodule(module_of(path))
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


def _compile(
    stage: StageModule, graph: StageGraph, number: int, rank: RankContext, device: torch.device
) -> Callable[..., Any]:
    """Return the forward of a graph on a rank: its operators get the rank's place, groups and device."""
    for name, kept in graph.kept.items():
        owner, last = _owner(stage, name)
        if isinstance(kept, Tensor):
            owner.register_buffer(last, kept.to(device), persistent=False)
        else:
            owner.add_module(last, _moved(kept, device))
    for name, call in graph.functions.items():
        _put_module(stage, name, _Function(find_callable(call.name, rank.callables), rank.groups[call.mesh_axis]))
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in copied.nodes:
        if getattr(node.target, "namespace", "") == "shardplan":
            _address(node, rank.groups)
    _move(copied, device)
    compiled = fx.GraphModule(stage, copied, class_name=f"Stage{number}")
    return type(compiled).forward


def _moved(kept: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a region of the graph, and of the regions in it, on a device."""
    assert isinstance(kept, fx.GraphModule), "a graph keeps only tensors and regions"
    moved = fx.GraphModule(kept, fx.Graph())
    moved.graph.output(moved.graph.graph_copy(kept.graph, {}))
    for name, inner in kept.named_children():
        moved.add_module(name, _moved(inner, device))
    _move(moved.graph, device)
    moved.recompile()
    return moved


def _move(graph: fx.Graph, device: torch.device) -> None:
    """Replace the device on which the model was exported, and remove checks of the export's assumptions."""
    for node in list(graph.nodes):
        if is_check(node) and not node.users:
            graph.erase_node(node)
            continue
        node.args = _on_device(node.args, device)
        node.kwargs = _on_device(node.kwargs, device)
        if getattr(node.target, "__name__", "") == "wrap_with_autocast":
            node.args = (device.type, *node.args[1:])


def _address(node: fx.Node, groups: Mapping[Any, SyncGroup]) -> None:
    """Replace the mesh axis in a collective operator by the group and the place of this rank."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # noqa: SLF001
    values = dict(zip(names, node.args, strict=False)) | node.kwargs
    mesh_axis: Any = values["group"]
    assert mesh_axis in groups, "an exported operator names its mesh axis, or a group of neighbours along it"
    values["group"] = groups[mesh_axis].name
    if "index" in values:
        values["index"] = groups[mesh_axis].index
    node.args, node.kwargs = tuple(values[name] for name in names), {}


def _on_device(value: Any, device: torch.device) -> Any:
    """Replace the device on which the model was exported."""
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
