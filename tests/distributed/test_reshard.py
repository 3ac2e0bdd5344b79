"""Training that goes on on another mesh of the same processes: what ranks hold is sent, and no file is written."""

from __future__ import annotations

import pytest
import torch

from shardplan.functional import execute, reshard, transfer
from shardplan.specs import Mesh
from tests.distributed.test_training_goes_on import NUM_STEPS, STOP, loss, mean, plan_of, train
from tests.helpers.ranks import results, run_ranks

PAIRS = [
    (Mesh(tensor=2), Mesh(data=2)),
    (Mesh(data=2), Mesh(pipe=2)),
    (Mesh(tensor=4), Mesh(pipe=2, tensor=2)),
    (Mesh(pipe=2, tensor=2), Mesh(data=2, tensor=2)),
]


def both(before, after):
    return plan_of(before, init_weights=True), plan_of(after, init_weights=False)


def run(plan):
    return execute(plan, device="cpu", loss_fn=loss if plan.pipeline else None)


def moved(rank, plans, before, after):
    """Return the losses of a run that never stopped, and of one that went on where it was sent."""
    source, target = map(run, plans)
    first = train(plans[0], source, rank, range(STOP))
    transfer(
        reshard(*plans),
        source.model,
        target.model,
        source_optimizer=source.optimizer,
        target_optimizer=target.optimizer,
    )
    on, there = (
        train(plan, built, rank, range(STOP, NUM_STEPS)) for plan, built in zip(plans, (source, target), strict=True)
    )
    return first, on, there


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " to ".join(str(mesh).removeprefix("mesh ") for mesh in pair))
def test_training_goes_on_where_it_was_sent(pair):
    outcomes = results(run_ranks(moved, pair[0].num_ranks, *pair, shared=both))
    first, on, there = (mean([outcome[n] for outcome in outcomes]) for n in range(3))
    torch.testing.assert_close(there, on, rtol=2e-5, atol=0)
    assert on[-1] < first[0]


def refused(rank, plans, before, after):
    """Return what each rank is told when the model of one is not the planned one."""
    source, target = map(run, plans)
    wrong = torch.nn.Linear(2, 2) if rank == 1 else source.model
    told = []
    for models, optimizers in (
        ((wrong, target.model), {}),
        ((source.model, target.model), {"source_optimizer": source.optimizer}),
    ):
        with pytest.raises(Exception, match=r"\w") as caught:
            transfer(reshard(*plans), *models, **optimizers)
        told.append(str(caught.value))
    return told


def test_what_is_wrong_on_one_rank_is_told_on_all():
    (first, second), other = results(run_ranks(refused, 2, *PAIRS[0], shared=both))
    assert [first, second] == other
    assert first.startswith("rank 1: PlanError:")
    assert "the model does not have it on this rank" in first
    assert "one of the two optimizers is given" in second


def alone(rank):
    """Return why two processes cannot go to four."""
    before, after = plan_of(Mesh(tensor=2), init_weights=True), plan_of(Mesh(tensor=4), init_weights=False)
    built = run(before)
    with pytest.raises(Exception, match=r"\w") as caught:
        transfer(reshard(before, after), built.model, None)
    return str(caught.value)


def test_another_number_of_processes_goes_by_files():
    text, _ = results(run_ranks(alone, 2))
    assert "tensor=2 has 2 ranks, mesh pipe=1 data=1 tensor=4 has 4, and the process group 2\n" in text
    assert "Go by files" in text
