"""The comparison is judged: whatever is changed in what a rank has shown is noticed."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from torch import nn

from shardplan.functional import create_schedule
from shardplan.functional.judging.compare import compare
from shardplan.functional.judging.exact import Draw
from shardplan.functional.judging.ranks import run_ranks
from shardplan.functional.judging.values import random_copy
from shardplan.functional.judging.whole import Job, run_whole
from shardplan.functional.plan import plan_unchecked
from shardplan.specs import Mesh
from shardplan.specs.source import ModuleValues


class Model(nn.Module):
    """A batch norm with split buffers, a dropout on split features, a norm, and a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.up, self.norm, self.drop, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.drop(self.norm(self.up(self.embed(ids))))))


@pytest.fixture
def shown():
    """What all ranks and the whole model have shown; the ranks agree with it."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = Model()
        whole = random_copy(model, 0)
        sch = create_schedule(whole, Mesh(data=2, tensor=2)).at["up"].colwise().at["down"].rowwise()
        sch = sch.at["norm.{weight,bias,running_mean,running_var}"].shard(axis=0).at["drop"].fork_rng()
        sch = evolve(sch, tree=sch.tree.map(lambda spec: evolve(spec, source=ModuleValues())))
        job = Job(({"ids": torch.tensor([1, 2, 3])}, {"ids": torch.tensor([4, 5, 6])}), draws=True)
        plan = plan_unchecked(sch, None)
        return plan, run_whole(whole, job), run_ranks(plan, whole, job, limit=60)
    finally:
        torch.set_default_dtype(torch.float32)


def found(shown):
    return {(difference.kind, difference.path) for difference in compare(*shown, 1e-7).differences}


def test_nothing_is_found_where_nothing_is_changed(shown):
    assert found(shown) == set()


def no_gradient(run):
    run.steps[0].gradients["up.weight"] = None


def permuted_gradient(run):
    run.steps[0].gradients["down.weight"] = run.steps[0].gradients["down.weight"].flip(1)


def one_entry(run):
    run.steps[0].gradients["norm.bias"][3] *= 1 + 1e-4


def gradient_of_a_replica(run):
    run.steps[0].gradients["down.bias"] = run.steps[0].gradients["down.bias"] / 2


def permuted_weight(run):
    run.steps[0].weights["up.weight"] = run.steps[0].weights["up.weight"].roll(1, 0)


def stale_buffer(run):
    run.steps[0].buffers["norm.running_mean"] = torch.zeros(8, dtype=torch.float64)


def output(run):
    run.steps[0].outputs[0][1, 2] += 1e-3


def no_output(run):
    run.steps[0].outputs = []


def loss(run):
    run.steps[0].loss = run.steps[0].loss * 1.01


@pytest.mark.parametrize(
    ("change", "kind", "path"),
    [
        (no_gradient, "gradient", "up.weight"),
        (permuted_gradient, "gradient", "down.weight"),
        (one_entry, "gradient", "norm.bias"),
        (gradient_of_a_replica, "gradient", "down.bias"),
        (permuted_weight, "weight", "up.weight"),
        (stale_buffer, "buffer", "norm.running_mean"),
        (output, "output", ""),
        (no_output, "shape", ""),
        (loss, "loss", ""),
    ],
)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_change_of_one_rank_is_noticed(shown, rank, change, kind, path):
    change(shown[2][rank].run)
    assert (kind, path) in found(shown)


def test_masks_that_are_equal_are_noticed(shown):
    ranks = shown[2]
    for rank in (0, 1):
        run = ranks[rank].run
        run.masks = [evolve(draw, values=torch.ones(draw.shape)) for draw in run.masks]
    assert found(shown) == set()  # masks of one value say nothing
    values = torch.tensor([0.0, 1.0]).repeat(3 * 4).view(3, 8)
    for rank in (0, 1):
        ranks[rank].run.masks = [Draw("drop", "bernoulli", (3, 8), values)]
    assert found(shown) == {("dropout", "drop")}


def test_masks_that_are_not_drawn_are_told(shown):
    shown[2][0].run.masks = []
    judged = compare(*shown, 1e-7)
    assert judged.differences == ()
    assert judged.notes == ("random numbers of drop (bernoulli) could not be compared",)
