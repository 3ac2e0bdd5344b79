"""Run the whole model: the inputs and the loss of a run, and its steps of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...specs.errors import PlanError, Problem
from ..model.copy import copy_module
from ..model.rng_state import derive_seed
from .exact import Exact
from .observe import Recorder, Run, Step, copied, default_loss, named_buffers, named_parameters, numbers_of, tensors_of
from .threads import seed_generators

LEARNING_RATE = 0.1

Inputs = Mapping[str, Any]
Loss = Callable[[Any], Tensor]


@frozen
class Job:
    """What is run.

    Args:
        inputs: The inputs of each place along ``data``.
        loss: From the model's output to the loss.
        num_steps: Number of steps of SGD.
        seed: The seed of random masks.
        draws: Whether the model draws random numbers, which are compared in a forward pass of their own.
    """

    inputs: tuple[Inputs, ...]
    loss: Loss = default_loss
    num_steps: int = 1
    seed: int = 0
    draws: bool = False

    def seed_of(self, place: int, number: int) -> int:
        """Return the seed of all ranks at a place along ``data`` in a step."""
        return derive_seed(self.seed, f"data {place} step {number}")


@frozen
class WholeRuns:
    """The whole model's runs.

    Args:
        runs: One for each place along ``data``; each step's gradients are the mean over all.
        order: Paths of parameters in the order in which their gradients come.
        not_lifted: Operators that computed in lower precision, with its relative spacing.
    """

    runs: tuple[Run, ...]
    order: tuple[str, ...]
    not_lifted: dict[str, float]


def run_whole(model: nn.Module, job: Job, *, halves: bool = False) -> WholeRuns:
    """Run the whole model on the inputs of each place along ``data``, as training with averaged gradients does.

    Args:
        model: The model with its values; a copy is trained.
        job: The inputs, the loss, the number of steps.
        halves: Whether sums of products are taken in another order.

    Raises:
        PlanError: If the loss cannot be taken of the output, or is no number.
    """
    model = copy_module(model, lambda tensor: tensor.detach().clone(), for_planning=False).train()
    runs = tuple(Run() for _ in job.inputs)
    recorder = Recorder([model])
    parameters, order = named_parameters([model]), dict[str, None]()
    trained = {path: parameter for path, parameter in parameters.items() if parameter.requires_grad}
    for path, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, path=path: order.setdefault(path))
    buffers = [copied(named_buffers([model])) for _ in runs]
    not_lifted: dict[str, float] = {}
    for number in range(job.num_steps):
        steps = [Step() for _ in runs]
        for place, (run, step, inputs, held) in enumerate(zip(runs, steps, job.inputs, buffers, strict=True)):
            _put_back(model, held)
            recorder.run = None if number else run
            seed_generators(job.seed_of(place, number))
            with Exact(recorder.where, halves=halves) as exact:
                output = model(**fresh(inputs))
                step.outputs, step.numbers = detached(output), numbers_of(output)
                step.loss = _loss_of(job, output)
                if step.loss.requires_grad:
                    step.loss.backward()
            not_lifted |= exact.not_lifted
            run.draws.extend(() if number else exact.draws)
            held.update(copied(named_buffers([model])))
            step.buffers = dict(held)
            run.steps.append(step)
        for parameter in {id(p): p for p in trained.values()}.values():
            parameter.grad = None if parameter.grad is None else parameter.grad / len(runs)
        for step in steps:
            step.gradients = gradients_of(trained)
        descend(trained)
        for step in steps:
            step.weights = copied(parameters)
    return WholeRuns(runs, tuple(order), not_lifted)


def unjudgeable(runs: WholeRuns, *, has_loss: bool) -> Problem | None:
    """Return why ranks cannot be told from the whole model: no outputs, or numbers beside which all look equal.

    Args:
        runs: The whole model's runs.
        has_loss: Whether the loss is the user's, who may take it of any output.
    """
    fix = "Give other inputs, or another loss"
    for number, step in ((number, step) for run in runs.runs for number, step in enumerate(run.steps, 1)):
        if not step.outputs and not has_loss:
            return Problem("the model's output", "it holds no tensor that can be found", f"Return tensors. {_LOSS}")
        if step.loss is not None and not isfinite(step.loss.detach().item()):
            return Problem("loss", f"the whole model's is {step.loss.detach().item()} in step {number}", fix)
        for path, gradient in step.gradients.items():
            if gradient is not None and not bool(gradient.isfinite().all()):
                cause = f"its gradient in the whole model is not finite in step {number}: beside it all look equal"
                return Problem(path, cause, fix)
    return None


def fresh(inputs: Inputs) -> dict[str, Any]:
    """Return copies of inputs, as a model may write into them."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, dict(inputs))


def detached(output: Any) -> list[Tensor]:
    """Return copies of the tensors of an output."""
    return [tensor.detach().clone() for tensor in tensors_of(output)]


def gradients_of(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """Return copies of gradients by path."""
    return {path: None if p.grad is None else p.grad.detach().clone() for path, p in trained.items()}


def descend(trained: Mapping[str, nn.Parameter]) -> None:
    """Make a step of SGD, and forget the gradients."""
    with torch.no_grad():
        for parameter in {id(p): p for p in trained.values()}.values():
            if parameter.grad is not None:
                parameter.sub_(LEARNING_RATE * parameter.grad)
            parameter.grad = None


_LOSS = "Pass a loss of the model's output that is one number: loss=lambda output: output.square().mean()"


def _loss_of(job: Job, output: Any) -> Tensor:
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(output)) or "no tensor"
    of = f"of the whole model's output, a {type(output).__name__} ({shapes})"
    try:
        loss = job.loss(output)
    except Exception as error:
        cause = f"it cannot be taken {of}: {type(error).__name__}: {error}"
        raise PlanError([Problem("loss", cause, _LOSS)]) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise PlanError([Problem("loss", f"{of} it gives {found}, not one real number", _LOSS)])
    return loss


def _put_back(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for path, buffer in named_buffers([model]).items():
            if path in held and held[path].shape == buffer.shape:
                buffer.copy_(held[path])
