"""Models of many families, split by what they declare or by what they compute, train as in one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from shardplan.functional import audit, create_schedule, execute, plan_build, predict
from shardplan.specs import Mesh, dumps, loads
from tests.helpers.families import BATCH, MAKERS, family, inputs, schedule_of
from tests.helpers.ranks import results, run_ranks

NUM_STEPS, CLIP = 10, 0.5


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


def loss_of(model, name, step, mine):
    given, target = inputs(name, step)
    logits = model(**{argument: tensor[mine] for argument, tensor in given.items()}).logits
    return cross_entropy(logits.flatten(0, -2), target[mine].flatten())


def train(rank, plans):
    """What one rank does: the losses and norms of each plan."""
    return {name: _train(rank, name, loads(text)) for name, text in plans.items()}


def _train(rank, name, plan):
    built = execute(plan, family(name), device="cpu", optimizer=adamw)
    assert built.receipt == predict(plan, rank), name
    share = BATCH // plan.mesh.data
    start = plan.mesh.coordinate(rank).data * share
    return _steps(*built, name, slice(start, start + share), built.clip_grad_norm_)


def _steps(model, optimizer, name, mine, clip):
    """The losses, and the norms of the gradients: Adam would not tell a gradient from its double."""
    losses, norms = [], []
    for step in range(NUM_STEPS):
        loss = loss_of(model, name, step, mine)
        losses.append(loss.item())
        loss.backward()
        norms.append(clip(CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def plan_of(name, mesh):
    plan = plan_build(schedule_of(name, mesh), target="torch", example_inputs=inputs(name, 0)[0])
    assert audit(plan).ok, name
    split = [spec for spec in plan.tree.values() if spec.mesh_axes(mesh.coordinate(0))]
    assert sum(spec.num_elements for spec in split) > 0.6 * sum(spec.num_elements for spec in plan.tree.values()), name
    return plan


@pytest.fixture(scope="module")
def alone():
    """The losses and norms of each unsplit model in one process."""
    built = {
        name: execute(plan_build(create_schedule(family(name), Mesh())), device="cpu", optimizer=adamw) for name in MAKERS
    }
    clips = {name: partial(torch.nn.utils.clip_grad_norm_, list(one.module.parameters())) for name, one in built.items()}
    return {name: _steps(*one, name, slice(None), clips[name]) for name, one in built.items()}


@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        (Mesh(tensor=2), tuple(MAKERS)),
        (Mesh(tensor=4), tuple(MAKERS)),
        (Mesh(data=2, expert=2, tensor=2), ("mixtral", "deepseek_v3")),
    ],
    ids=str,
)
def test_training_equals_one_process(mesh, names, alone):
    plans = {name: dumps(plan_of(name, mesh)) for name in names}
    ranks = results(run_ranks(train, mesh.num_ranks, plans))
    for name in names:
        losses, norms = alone[name]
        for step in range(NUM_STEPS):
            mean = sum(one[name][0][step] for one in ranks) / len(ranks)
            assert mean == pytest.approx(losses[step], rel=1e-4), f"{name}, step {step}"
            assert ranks[0][name][1][step] == pytest.approx(norms[step], rel=1e-3), f"{name}, gradients of step {step}"
        assert losses[-1] < losses[0], name
