"""What a run of a model shows: activations of its modules, outputs, loss, gradients, and tensors after a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from attrs import Factory, define, frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..model.open_modules import OpenModules
from ..model.rng_state import derive_seed
from .exact import Draw
from .groups import Call

Side = Literal["input", "output"]


@frozen
class Seen:
    """The floating-point inputs or outputs of a call of a module.

    Args:
        path: Path of the module.
        call: Number of the call of that module, from 0.
        side: Whether they are inputs or outputs.
        tensors: The tensors, detached.
    """

    path: str
    call: int
    side: Side
    tensors: tuple[Tensor, ...]


@define(eq=False)
class Step:
    """One step of training.

    Args:
        outputs: The tensors that the model returns; None on ranks without the last stage.
        numbers: The plain numbers that it returns; None for stages, whose graphs return none.
        loss: The loss; None on ranks without the last stage.
        gradients: Gradients of trained parameters by path, as the optimizer gets them; None where there is none.
        weights: Parameters by path, after the step.
        buffers: Buffers by path, after the step.
    """

    outputs: list[Tensor] | None = None
    numbers: list[float] | None = None
    loss: Tensor | None = None
    gradients: dict[str, Tensor | None] = Factory(dict)
    weights: dict[str, Tensor] = Factory(dict)
    buffers: dict[str, Tensor] = Factory(dict)


@define(eq=False)
class Run:
    """What a run shows.

    Args:
        steps: Its steps.
        seen: Activations of the first step, in the order of execution.
        draws: Random numbers that the whole model draws in its first step, without their values.
        masks: Random numbers that a rank draws in a forward pass of its own.
        issued: The collectives that it issued.
    """

    steps: list[Step] = Factory(list)
    seen: list[Seen] = Factory(list)
    draws: list[Draw] = Factory(list)
    masks: list[Draw] = Factory(list)
    issued: list[Call] = Factory(list)


class Recorder:
    """Records the activations of a model's modules.

    Args:
        models: The model, or the stages that a rank has of it.
        run: Takes what is recorded; None for nothing.
    """

    def __init__(self, models: Iterable[nn.Module], run: Run | None = None) -> None:
        self._running = OpenModules()
        self._num_calls: dict[str, int] = {}
        self.run = run
        for model in models:
            self._running.follow(model)
            for path, module in model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    self._hook(path, module)

    @property
    def run(self) -> Run | None:
        """The run that takes what is recorded."""
        return self._run

    @run.setter
    def run(self, run: Run | None) -> None:
        self._run = run
        self._num_calls.clear()

    def where(self) -> str:
        """Return the path of the module that is running, or that raised."""
        return self._running.innermost

    def _hook(self, path: str, module: nn.Module) -> None:
        open_calls: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._run is not None:
                open_calls.append(self._num_calls.get(path, 0))
                self._num_calls[path] = open_calls[-1] + 1
                self._run.seen.append(Seen(path, open_calls[-1], "input", tuple(_copies((*args, *kwargs.values())))))

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if self._run is not None:
                self._run.seen.append(Seen(path, open_calls.pop(), "output", tuple(_copies(output))))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of a model's output: of tuples, lists, mappings and dataclasses too."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def numbers_of(value: Any) -> list[float]:
    """Return the plain numbers of a model's output."""
    return [float(leaf) for leaf in _leaves(value) if isinstance(leaf, (int, float))]


def _leaves(value: Any) -> Iterator[Any]:
    match value:
        case Tensor():
            yield value
        case Mapping():
            yield from (leaf for item in value.values() for leaf in _leaves(item))
        case list() | tuple():
            yield from (leaf for item in value for leaf in _leaves(item))
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from (leaf for part in dataclasses.fields(value) for leaf in _leaves(getattr(value, part.name)))
        case _:
            yield from tree_leaves(value)


def default_loss(output: Any) -> Tensor:
    """Return a fixed linear function of the finite numbers of an output, with coefficients drawn at random."""
    parts = [torch.zeros((), dtype=torch.float64)]
    for number, tensor in enumerate(tensors_of(output)):
        if tensor.is_floating_point() or tensor.is_complex():
            numbers = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            generator = torch.Generator().manual_seed(derive_seed(number, str(list(numbers.shape))))
            weights = torch.randn(numbers.shape, generator=generator, dtype=torch.float64)
            parts.append((torch.where(numbers.isfinite(), numbers, 0) * weights).sum() / max(1, numbers.numel()))
    return torch.stack(parts).sum()


def named_parameters(modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of modules by all their paths."""
    return {path: p for module in modules for path, p in module.named_parameters(remove_duplicate=False)}


def named_buffers(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Return the buffers of modules by all their paths."""
    return {path: b for module in modules for path, b in module.named_buffers(remove_duplicate=False)}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors, as they are now."""
    return {path: tensor.detach().clone() for path, tensor in tensors.items()}


def _copies(values: Any) -> Iterator[Tensor]:
    return (tensor.detach().clone() for tensor in tensors_of(values) if tensor.is_floating_point())
