"""A runtime of another package, complete: SGD, with gradients averaged over ``data`` after each micro-batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from attrs import evolve

from shardplan.functional.dialects.accounting import (
    Messages,
    Training,
    crossings,
    local_parameters,
    named_optimizer,
    total_bytes,
    whole_state,
)
from shardplan.functional.dialects.handover import Wrapped
from shardplan.functional.dialects.holding import Holding
from shardplan.specs import Finding, Problem


class ToyDialect:
    """``target="toy"``; its configuration names ``num_microbatches`` and an ``optimizer``."""

    pipeline_options = ()

    def check(self, mesh, tree, layout, config):
        if not config:
            return [Problem("config", "the toy needs its configuration", 'config={"num_microbatches": 2}')]
        return [*self.wrong_numbers(config)]

    def check_pipeline(self, mesh, tree, pipeline, config):
        if pipeline is None:
            return []
        return [Problem("", f"the toy is whole, and the model is cut into {len(pipeline.stages)} stages", "Cut nothing")]

    def groups(self, mesh):
        return (("data",),) if mesh.data > 1 else ()

    def wrong_numbers(self, config):
        if not isinstance(num := config.get("num_microbatches", 1), int):
            yield Problem("config.num_microbatches", f"it is a number, not {num!r}", "Write one")

    def training(self, plan):
        return Training((plan.config or {}).get("num_microbatches", 1), named_optimizer(plan.config))

    def in_flight(self, plan, stage):
        return 1

    def state(self, plan, coordinate, alike=None):
        state = whole_state(plan, coordinate)
        momenta = total_bytes(p for p in local_parameters(plan, coordinate) if p.is_trained)
        return evolve(state, optimizer_bytes=momenta, bucket_bytes=state.gradient_bytes)

    def messages(self, plan, coordinate):
        num, reached = self.training(plan).num_microbatches, local_parameters(plan, coordinate)
        yield from crossings(plan, coordinate.pipe, num)
        reached = [parameter for parameter in reached if parameter.has_gradient]
        yield Messages("data", "gradients", "all_reduce", num * len(reached), num * total_bytes(reached))

    def findings(self, plan):
        if plan.mesh.num_ranks > 8:
            yield Finding("SP022", "warning", "", f"a toy with {plan.mesh.num_ranks} ranks is slow", "Take 8 at most")

    def check_installed(self):
        return []

    def check_loss(self, plan, loss_fn):
        return [] if loss_fn is None else [Problem("loss_fn", "the toy computes its own loss", "Leave it out")]

    def wrap(self, handover):
        trainer = Toy(handover.modules[0], handover.plan, handover.groups)
        return Wrapped(trainer, trainer.optimizer, extras={"volume": 11})

    def holding(self):
        return Holding()


class Toy:
    """Trains by ``step``."""

    def __init__(self, module, plan, groups):
        self.module, self.plan, self.groups = module, plan, groups
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)

    def step(self, *inputs):
        for part in zip(*(tensor.chunk(self.plan.config["num_microbatches"]) for tensor in inputs), strict=True):
            self.module(*part).float().square().mean().backward()
            for parameter in self.module.parameters() if self.plan.mesh.data > 1 else ():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.groups["data",])
                    parameter.grad /= self.plan.mesh.data
        self.optimizer.step()
        self.optimizer.zero_grad()
