"""Record a run of a model on fake tensors: the whole model, and the model as one rank has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from ...specs.mesh import Mesh
from ..layout.forward.run_once import SkippedLayers
from ..layout.local_model import LocalModel, following
from ..layout.user_syncs import SyncFunction, stand_in
from ..model.known_values import KnownValues
from ..model.open_modules import OpenModules
from .tape import ModuleCall, SkippedLayer, Tape
from .tape_writer import TapeWriter

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from ...specs.layout_steps import LayoutStep, Sync
    from ...specs.mesh import Coordinate
    from ..model.repeated_layers import LayerCall, Representative


@frozen(eq=False)
class Stopped:
    """A run that stopped.

    Args:
        path: The innermost module that ran.
        error: What its code raised.
        tape: What ran before.
        unsaid: Steps whose functions, of the user's own, could not run without a process group: their results had the
            shape of what they took.
    """

    path: str
    error: Exception
    tape: Tape
    unsaid: tuple[Sync, ...] = ()


def record_whole(subject: LocalModel, *, skip: bool = True) -> Tape | Stopped:
    """Record a forward pass of the whole model, at its own shapes, without the layout.

    Args:
        subject: The model, with example inputs. Its modules train if they do in the user's model, which stays as it is.
        skip: Whether repeated layers are skipped; the same ones as by :func:`record_local`.
    """
    unsplit = subject.tree.map(lambda spec: evolve(spec, shards=()) if spec.shards else spec)
    whole = evolve(subject, mesh=Mesh(), tree=unsplit, layout=())
    return _recorded(whole, subject, whole.mesh.coordinate(0), (), skip=skip)


def record_local(
    subject: LocalModel, *, skip: bool = True, coordinate: Coordinate | None = None, chain: Sequence[Sequence[str]] = ()
) -> Tape | Stopped:
    """Record a forward pass of the model as one rank has it, with the layout applied.

    Args:
        subject: As for :func:`record_whole`.
        skip: Whether repeated layers are skipped.
        coordinate: The rank; the first by default.
        chain: Paths of the modules of each stage that are called in sequence, in place of the model's own forward.

    >>> from shardplan.functional import create_schedule
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 8, bias=False))
    >>> sch = create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise()
    >>> example_inputs = {"input": torch.empty(4, 8, device="meta")}
    >>> tape = record_local(LocalModel(model, sch.mesh, sch.tree, sch.layout, example_inputs=example_inputs))
    >>> [(call.name, call.module, *(tape.values[n].shape for n in call.results)) for call in tape.calls[1:4]]
    [('linear', '0', (4, 16)), ('dropout', '1', (4, 16)), ('linear', '2', (4, 8))]
    >>> tape.calls[0].name, tape.calls[4].name
    ('shardplan::sum_gradient', 'shardplan::all_reduce')
    """
    return _recorded(subject, subject, coordinate or subject.mesh.coordinate(0), chain, skip=skip)


def _recorded(
    run: LocalModel, subject: LocalModel, coordinate: Coordinate, chain: Sequence[Sequence[str]], *, skip: bool
) -> Tape | Stopped:
    """Record a run of a model; which layers repeat each other is told from the split model."""
    with torch.inference_mode(mode=False):
        found, is_sound = _tried(run, subject, coordinate, chain, skip=skip)
        return found if is_sound else _tried(run, subject, coordinate, chain, skip=False)[0]


def _tried(
    run: LocalModel, subject: LocalModel, coordinate: Coordinate, chain: Sequence[Sequence[str]], *, skip: bool
) -> tuple[Tape | Stopped, bool]:
    """Record a run; also tell whether each layer that was skipped was called once."""
    mode, running = FakeTensorMode(allow_non_fake_inputs=True), OpenModules()
    values = KnownValues()
    writer = TapeWriter(running, _tried.__code__, values)
    places = {id(step): place for place, step in enumerate(run.layout)}

    @contextmanager
    def around(step: LayoutStep) -> Iterator[None]:
        writer.steps.append(places[id(step)])
        try:
            yield
        finally:
            writer.steps.pop()

    unsaid: list[Sync] = []

    def synchronise(step: Sync, function: SyncFunction) -> SyncFunction:
        return stand_in(step, function, unsaid.append)

    local = run.fake_copy(mode, named=True, coordinate=coordinate, around=around, synchronise=synchronise)
    layers = _WrittenLayers(subject.layout, subject.tree, running.num_calls, writer=writer)
    with following(mode, values), torch.enable_grad(), _checkpoints_in_line():
        if skip:
            layers.watch(subject.model, local)
        running.follow(local)
        _write_modules(local, writer)
        layers.settle(local)
        inputs = run.fake_inputs(values)
        writer.name_tensors(local, subject.tree)
        try:
            with writer, writer.composites:
                tape = writer.tape
                tape.inputs |= {name: writer.value(value) for name, value in inputs.items() if isinstance(value, Tensor)}
                outputs = _called(local, chain, inputs) if chain else local(**inputs)
                tape.outputs += writer.values(outputs)
                tape.reached |= {tape.values[writer.value(tensor)].path for tensor in _behind(outputs)}
                tape.numbers += (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, (int, float)))
                writer.name_changed(local, subject.tree)
        except Exception as error:  # noqa: BLE001  the model's code may raise any error, which is reported
            return Stopped(running.innermost, error, writer.tape, tuple(unsaid)), not layers.representative_of
        writer.backward.run()
    return tape, layers.is_sound


def _called(model: nn.Module, chain: Sequence[Sequence[str]], inputs: Mapping[str, Any]) -> Any:
    """Call modules in sequence, each with the tensors that the one before returns."""
    given: Any = tuple(inputs.values())
    for path in (path for stage in chain for path in stage):
        given = tuple(leaf for leaf in tree_leaves(model.get_submodule(path)(*given)) if isinstance(leaf, Tensor))
    return given


def _behind(outputs: Any) -> Iterator[Tensor]:
    """Iterate over the tensors to which torch's backward pass comes from some outputs."""
    todo: list[Any] = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    seen: set[Any] = {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += (further for further, _ in node.next_functions)
            if hasattr(node, "variable"):
                yield node.variable


def _write_modules(model: nn.Module, writer: TapeWriter) -> None:
    """Let a tape have the calls of all modules, with what they are given and return, outside of the layout's hooks."""
    opened: list[tuple[tuple[int, ...], int]] = []

    def follow(path: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            opened.append((writer.values((args, kwargs)), len(writer.tape.calls)))

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            given, start = opened.pop()
            call = ModuleCall(path, given, writer.values(output), start, len(writer.tape.calls))
            writer.tape.modules.append(call)

        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(leave)

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            follow(path, module)


@define(kw_only=True)
class _WrittenLayers(SkippedLayers):
    """Repeated layers in a run that is recorded: the tape says which are skipped.

    Args:
        writer: Writes the tape.
        given: The values that each layer was called with, by path.
    """

    writer: TapeWriter
    given: dict[str, tuple[int, ...]] = Factory(dict)

    def first(self, call: LayerCall, leaves: list[Any], structure: TreeSpec) -> Any:
        """Run a layer that repeats none."""
        self.given[call.path] = self.writer.values(leaves)
        return super().first(call, leaves, structure)

    def repeat(self, call: LayerCall, representative: Representative, leaves: list[Any], structure: TreeSpec) -> Any:
        """Run the second layer of a family and let it stand for the rest; skip the rest."""
        self.given[call.path] = given = self.writer.values(leaves)
        if representative.is_second:
            path = representative.path
            self.writer.tape.skipped.append(SkippedLayer(call.path, path, given, self.given[path]))
        return super().repeat(call, representative, leaves, structure)


@contextmanager
def _checkpoints_in_line() -> Iterator[None]:
    """Let torch's re-entrant checkpoints run their code as it stands, with gradients, within the block."""
    function: Any = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _InLine
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = function


class _InLine:
    """Stands for the function of re-entrant checkpoints, which hides its code from autograd."""

    @staticmethod
    def apply(run: Callable[..., Any], _: bool, *args: Any) -> Any:  # noqa: FBT001  as torch calls it
        """Run the code; without gradients if it is given no tensor that needs one, as such a checkpoint does."""
        needs = any(isinstance(value, Tensor) and value.requires_grad for value in args)
        with torch.set_grad_enabled(needs and torch.is_grad_enabled()):
            return run(*args)
