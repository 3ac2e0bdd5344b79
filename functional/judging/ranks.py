"""Run all ranks of a plan as threads: forward, backward, the runtime's sums of gradients, and a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import Factory, define
from torch import Tensor, nn

from ...specs.mesh import MESH_AXES, STAGE_AXES, Coordinate
from ...specs.plan import Plan
from ..dialects.handover import split_experts
from ..pipeline.stage_module import facts_of
from .exact import Exact
from .filling import filled
from .groups import threads_as_ranks, world_group
from .observe import Recorder, Run, Step, copied, named_buffers, named_parameters, numbers_of
from .threads import Ended, RankThreads, seed_generators
from .whole import Job, descend, detached, fresh, gradients_of

EXCHANGE = "the exchange of gradients"
"""What ranks meet for after a backward pass, where the runtime would sum and average gradients."""


@define(eq=False)
class RankRun:
    """A rank's run.

    Args:
        run: What it has shown.
        ended: What became of it.
        where: Path of the module that ran when it ended.
    """

    run: Run = Factory(Run)
    ended: Ended[None] = Factory(Ended[None])
    where: str = ""


def run_ranks(plan: Plan, model: nn.Module, job: Job, *, limit: float) -> list[RankRun]:
    """Run all ranks of a plan as threads; return what each has shown, and what became of it.

    Args:
        plan: The plan, whose ranks take their parts of the model's values.
        model: The model with its values; it is not changed.
        job: The inputs, the loss, the number of steps.
        limit: Seconds after which the ranks are given up.
    """
    threads = RankThreads(plan.mesh.num_ranks, limit)
    runs = [RankRun() for _ in range(plan.mesh.num_ranks)]

    def live(rank: int) -> None:
        one = _Rank(plan, plan.mesh.coordinate(rank), model, job, threads, runs[rank].run)
        try:
            one.live()
        finally:
            runs[rank].where = one.where()

    with threads_as_ranks():
        for run, ended in zip(runs, threads.run(live), strict=True):
            run.ended = ended
    return runs


@define(eq=False)
class _Rank:
    """One rank while it runs.

    Args:
        plan: The plan.
        coordinate: Where it stands.
        model: The whole model with its values.
        job: The inputs, the loss, the number of steps.
        threads: All ranks.
        run: Takes what it shows.
    """

    plan: Plan
    coordinate: Coordinate
    model: nn.Module
    job: Job
    threads: RankThreads
    run: Run
    modules: tuple[nn.Module, ...] = ()
    recorder: Recorder | None = None

    def where(self) -> str:
        return self.recorder.where() if self.recorder else ""

    def live(self) -> None:
        world_group(self.threads, self.where, self.run.issued).join()
        effects = filled(self.plan, self.coordinate, self.model)
        self.modules = effects.modules
        for module in self.modules:
            module.train()
        self.recorder = Recorder(self.modules)
        for number in range(self.job.num_steps):
            self.recorder.run = None if number else self.run
            self.seed(number)
            self.run.steps.append(self.step(effects.tied))
        self.recorder.run = None
        if self.job.draws:
            self.seed(0)
            with torch.no_grad(), Exact(self.where, is_random=True) as exact:
                self.forward(Step())
            self.run.masks.extend(exact.draws)

    def seed(self, number: int) -> None:
        """Let ranks that share a batch draw the same numbers in a step, as the whole model does on it."""
        seed_generators(self.job.seed_of(self.coordinate.index("data"), number))

    def step(self, tied: Mapping[str, tuple[int, ...]]) -> Step:
        step = Step()
        parameters = named_parameters(self.modules)
        trained = {path: parameter for path, parameter in parameters.items() if parameter.requires_grad}
        with Exact(self.where):
            self.backward(self.forward(step), step)
        brings = _Brings(self.coordinate, trained, tied)
        self.threads.meet("gradients", range(self.threads.num_ranks), EXCHANGE, brings, self.sum_and_average)
        step.gradients = gradients_of(trained)
        descend(trained)
        step.weights = copied(parameters)
        step.buffers = copied(named_buffers(self.modules))
        return step

    def forward(self, step: Step) -> list[_StageCall]:
        """Run this rank's part of a forward pass; stages hand their outputs over."""
        inputs = fresh(self.job.inputs[self.coordinate.index("data")])
        if self.plan.pipeline is None:
            output = self.modules[0](**inputs)
            step.outputs, step.numbers, step.loss = detached(output), numbers_of(output), self.job.loss(output)
            return []
        stages = self.plan.pipeline.stages
        calls: list[_StageCall] = []
        for module in sorted(self.modules, key=lambda module: facts_of(module).number):
            number = facts_of(module).number
            given = (
                [inputs[activation.name] for activation in stages[0].inputs]
                if number == 0
                else self.threads.take(self.box("activations", number))
            )
            taken = [
                tensor.requires_grad_(planned.requires_grad and torch.is_grad_enabled())
                for tensor, planned in zip(given, stages[number].inputs, strict=True)
            ]
            output = module(*taken)
            if number == len(stages) - 1:
                step.outputs, step.loss = detached(output), self.job.loss(output)
                calls.append(_StageCall(number, taken, []))
            else:
                self.threads.give(self.box("activations", number + 1), [tensor.detach().clone() for tensor in output])
                calls.append(_StageCall(number, taken, list(output)))
        return calls

    def backward(self, calls: list[_StageCall], step: Step) -> None:
        """Run this rank's part of a backward pass; stages hand the gradients of their inputs over."""
        if self.plan.pipeline is None:
            calls = [_StageCall(0, [], [])]
        for call in reversed(calls):
            if call.outputs:
                sent = self.threads.take(self.box("gradients", call.number))
                pairs = [(o, g) for o, g in zip(call.outputs, sent, strict=True) if o.requires_grad and g is not None]
                if pairs:
                    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            elif step.loss is not None and step.loss.requires_grad:
                step.loss.backward()
            if call.number > 0:
                self.threads.give(self.box("gradients", call.number - 1), [tensor.grad for tensor in call.inputs])

    def box(self, what: str, stage: int) -> tuple[Any, ...]:
        """Name the box in which a stage with this rank's batch and part finds what its neighbour hands over."""
        return (what, stage, *(self.coordinate.index(axis) for axis in STAGE_AXES))

    def sum_and_average(self, brought: dict[int, _Brings]) -> None:
        """Do with gradients what runtimes do: sum those of ties over stages, and average them over ``data``."""
        everyone = list(brought.values())
        for path in dict.fromkeys(path for one in everyone for path in one.tied):
            paths = self.plan.tree[path].paths
            for group in _alike(everyone, "pipe", lambda one: path in one.tied):  # noqa: B023  used at once
                _spread([next(one.named[at] for at in paths if at in one.named) for one in group], divide=1)
        kept = {*split_experts(self.plan)}
        kept |= {path for spec in self.plan.tree.values() if spec.on("data") for path in spec.paths}
        for group in _alike(everyone, "data", lambda _: True):
            for path in {id(parameter): path for path, parameter in group[0].named.items()}.values():
                if path not in kept:
                    _spread([one.named[path] for one in group], divide=len(group))


@define(eq=False)
class _StageCall:
    """A call of a stage: its number, its inputs, and its outputs; no outputs for the last stage, which has a loss."""

    number: int
    inputs: list[Tensor]
    outputs: list[Tensor]


@define(eq=False)
class _Brings:
    """A rank's gradients: its coordinate, its trained parameters by all their paths, and its ties over stages."""

    coordinate: Coordinate
    named: dict[str, nn.Parameter]
    tied: Mapping[str, tuple[int, ...]]


def _alike(everyone: list[_Brings], mesh_axis: str, has: Any) -> list[list[_Brings]]:
    """Return the ranks that have something, in groups that differ along one mesh axis alone."""
    groups: dict[tuple[int, ...], list[_Brings]] = {}
    for one in everyone:
        if has(one):
            rest = tuple(one.coordinate.index(axis) for axis in MESH_AXES if axis != mesh_axis)
            groups.setdefault(rest, []).append(one)
    return list(groups.values())


def _spread(parameters: list[nn.Parameter], divide: int) -> None:
    """Give each rank the sum of all gradients, divided; missing gradients count as zero."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not found or len(parameters) == 1:
        return
    total = torch.stack(found).sum(0) / divide
    for parameter in parameters:
        parameter.grad = total.clone()
