"""Optimizers with a scheduler of learning rates go on as they were."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from shardplan.functional import create_schedule, execute, load_optimizer, plan_build, save_checkpoint
from shardplan.specs import Checkpoint, Mesh

SCHEDULERS = {
    "": None,
    "LambdaLR": partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "OneCycleLR": partial(OneCycleLR, max_lr=0.1, total_steps=20),
}


def built(init_weights=None):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    plan = plan_build(create_schedule(model, Mesh()), init_weights=init_weights or True)
    return plan, *execute(plan, device="cpu", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))


def train(model, optimizer, scheduler, steps):
    losses = []
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :1]).square().mean()
        losses.append((loss.item(), optimizer.param_groups[0]["lr"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return losses


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_is_made_before_the_states_are_loaded_goes_on(tmp_path, name):
    make = SCHEDULERS[name] or (lambda _: None)
    plan, model, optimizer = built()
    scheduler = make(optimizer)
    train(model, optimizer, scheduler, range(4))
    save_checkpoint(plan, model, tmp_path / "saved", optimizer=optimizer)
    state = scheduler and scheduler.state_dict()
    went_on = train(model, optimizer, scheduler, range(4, 8))
    plan, model, optimizer = built(Checkpoint(str(tmp_path / "saved")))
    scheduler = make(optimizer)
    load_optimizer(plan, model, optimizer, tmp_path / "saved")
    if scheduler is not None:
        scheduler.load_state_dict(state)
    assert train(model, optimizer, scheduler, range(4, 8)) == went_on


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("before", SCHEDULERS)
def test_schedulers_are_no_reason_to_refuse_states(tmp_path, before, name):
    plan, model, optimizer = built()
    scheduler = SCHEDULERS[before] and SCHEDULERS[before](optimizer)
    train(model, optimizer, scheduler, range(2))
    save_checkpoint(plan, model, tmp_path / "saved", optimizer=optimizer)
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    plan, model, optimizer = built(Checkpoint(str(tmp_path / "saved")))
    if SCHEDULERS[name]:
        SCHEDULERS[name](optimizer)
    load_optimizer(plan, model, optimizer, tmp_path / "saved")
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moments)
