"""Split models, trained by real processes, equal the unsplit one in one process."""

from __future__ import annotations

import pytest
import torch

from shardplan.functional import execute, plan_build, predict
from shardplan.specs import Mesh
from tests.helpers.models import schedule
from tests.helpers.ranks import results, run_ranks
from tests.helpers.training import CLIP, plan_training, put_together, train_alone, train_ranks


def deepspeed_config(stage):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
    }


def check(name, mesh, target=None, config=None, strategy="auto"):
    asked = name, mesh, target, config, strategy
    plan, ranks = plan_training(*asked), results(run_ranks(train_ranks, mesh.num_ranks, *asked, shared=plan_training))
    weights = put_together(plan, [one["weights"] for one in ranks])
    unsplit = execute(plan_build(schedule(name)), device="cpu").module
    alone = {**dict(unsplit.named_parameters()), **dict(unsplit.named_buffers())}
    for path, tensor in weights.items():
        assert torch.equal(tensor, alone[path]), f"{path} is another tensor without a process group"
    logits, losses = train_alone(name, weights, clip=target is not None)
    for rank, one in enumerate(ranks):
        torch.testing.assert_close(one["logits"], logits)
        assert one["receipt"] == predict(plan, rank)
    for step, loss in enumerate(losses):
        mean = sum(one["losses"][step] for one in ranks) / len(ranks)
        assert mean == pytest.approx(loss, rel=1e-4), f"step {step}"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["llama", "plain"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_tensor_parallel_training_equals_one_process(name, tensor):
    check(name, Mesh(tensor=tensor))


@pytest.mark.parametrize("name", ["llama", "plain"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_with_clipping_equals_one_process(name, stage):
    check(name, Mesh(data=2, tensor=2), "deepspeed", deepspeed_config(stage))


def test_broadcast_strategy_trains_alike():
    check("plain", Mesh(tensor=2), strategy="broadcast")
