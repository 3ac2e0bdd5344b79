"""Training that goes on from what another mesh has saved: the losses are those of a run that never stopped."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from shardplan.functional import create_schedule, execute, load_optimizer, plan_build, save_checkpoint
from shardplan.specs import Checkpoint, Mesh
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks

STOP, NUM_STEPS, ROWS, LENGTH, MICRO = 3, 6, 8, 8, 2
SPLITS = (Mesh(data=2), Mesh(pipe=2, tensor=2))
MESHES = (Mesh(), Mesh(tensor=4), Mesh(data=2, tensor=2), Mesh(pipe=2))
ADAM = {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}}


def plan_of(mesh, init_weights):
    model = llama(tie_word_embeddings=True, use_cache=False, num_key_value_heads=4)
    sch = split_llama(model, mesh) if mesh.tensor > 1 else create_schedule(model, mesh)
    if mesh.pipe == 1:
        return plan_build(sch, target="torch", config={"optimizer": ADAM}, init_weights=init_weights)
    return plan_build(
        sch.cut_evenly(mesh.pipe),
        target="torch",
        config={"optimizer": ADAM, "num_microbatches": MICRO},
        init_weights=init_weights,
        example_inputs={"input_ids": torch.zeros(ROWS // MICRO, LENGTH, dtype=torch.long)},
    )


def plan_from_code(mesh, folder):
    return plan_of(mesh, init_weights=True)


def plan_from_folder(mesh, folder):
    return plan_of(mesh, Checkpoint(folder))


def loss(output, target):
    return cross_entropy(output.logits.flatten(0, 1), target.flatten())


def batch(step, mesh, rank):
    ids = torch.randint(0, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    share = ROWS // mesh.data
    start = mesh.coordinate(rank).data * share
    return ids[start : start + share]


def train(plan, built, rank, steps):
    """Train; the losses are means over all of the batch."""
    losses = []
    for step in steps:
        ids = batch(step, plan.mesh, rank)
        if plan.pipeline:
            found = built.model.train_batch(ids, target=ids)
        else:
            found = loss(built.model(input_ids=ids), ids)
            found.backward()
        losses.append(found.item())
        built.optimizer.step()
        built.optimizer.zero_grad()
    return losses


def never_stopped(rank, plan, mesh, folder):
    """Train, save on the way, train on."""
    built = execute(plan, device="cpu", loss_fn=loss if plan.pipeline else None)
    before = train(plan, built, rank, range(STOP))
    save_checkpoint(plan, built.model, folder, optimizer=built.optimizer)
    return before + train(plan, built, rank, range(STOP, NUM_STEPS))


def gone_on(rank, plan, mesh, folder):
    """Train from what was saved."""
    built = execute(plan, device="cpu", loss_fn=loss if plan.pipeline else None)
    for group in built.optimizer.param_groups:
        group["lr"] = 99.0  # what was saved is what counts
    load_optimizer(plan, built.model, built.optimizer, folder)
    assert all(group["lr"] == ADAM["params"]["lr"] for group in built.optimizer.param_groups)
    return train(plan, built, rank, range(STOP, NUM_STEPS))


def mean(by_rank):
    """Return the losses of a run: means over the ranks, which have equal shares of the batch."""
    return torch.tensor(by_rank, dtype=torch.float64).mean(0)


@pytest.fixture(scope="module", params=SPLITS, ids=str)
def saved(request, tmp_path_factory):
    """A folder that one mesh has saved, and the losses of the run that went on there."""
    folder = tmp_path_factory.mktemp("saved") / "step-3"
    losses = results(run_ranks(never_stopped, request.param.num_ranks, request.param, folder, shared=plan_from_code))
    return folder, mean(losses)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_training_goes_on_on_another_mesh(saved, mesh):
    folder, wanted = saved
    losses = results(run_ranks(gone_on, mesh.num_ranks, mesh, folder, shared=plan_from_folder))
    torch.testing.assert_close(mean(losses), wanted[STOP:], rtol=2e-5, atol=0)
    assert wanted[-1] < wanted[0]
