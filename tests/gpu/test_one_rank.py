"""The one-rank road on CUDA: plan on the CPU, execute on the device, train."""

from __future__ import annotations

import pytest
import torch

from shardplan.functional import execute, plan_build, predict
from tests.helpers.models import schedule
from tests.helpers.training import adamw, batch, loss_of, vocab_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_a_plan_is_executed_and_trained_on_the_device(name):
    plan = plan_build(schedule(name))
    generators = torch.get_rng_state(), torch.cuda.get_rng_state()
    built = execute(plan, optimizer=adamw)
    model, optimizer = built
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert built.receipt == predict(plan, 0)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(torch.cuda.get_rng_state(), generators[1])
    losses = []
    for step in range(10):
        loss = loss_of(model, batch(step, vocab_of(name)).cuda())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_weights_on_the_device():
    one, two = (execute(plan_build(schedule("llama"), seed=5)).module for _ in range(2))
    for (path, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), path


def test_planning_leaves_the_device_alone():
    before = torch.cuda.memory_allocated()
    plan_build(schedule("llama"))
    assert torch.cuda.memory_allocated() == before


def test_what_is_held_is_what_the_device_has_allocated():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    plan = plan_build(schedule("llama"))
    module = execute(plan).module
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*module.parameters(), *module.buffers()))
    grains = 512 * len(plan.tree)  # the allocator rounds each tensor up
    assert held <= torch.cuda.memory_allocated() - before <= held + grains
