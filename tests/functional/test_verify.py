"""verify: what it finds, where it says that it begins, and that it leaves the process as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardplan.functional import create_schedule, verify
from shardplan.specs import Mesh, PlanError
from tests.helpers.families import family
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks

X = {"x": torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))}


class Mlp(nn.Module):
    """Two layers with dropout within and after."""

    def __init__(self, p=0.0, middle=None):
        super().__init__()
        self.up, self.inner, self.down, self.outer = nn.Linear(16, 32), nn.Dropout(p), nn.Linear(32, 16), nn.Dropout(p)
        self.middle = middle or nn.ReLU()

    def forward(self, x):
        return self.outer(self.down(self.inner(self.middle(self.up(x)))))


def mlp(mesh, **options):
    return create_schedule(Mlp(**options), mesh).at["up"].colwise().at["down"].rowwise()


def kinds(comparison):
    return {difference.kind for difference in comparison.differences}


@pytest.mark.parametrize("mesh", [Mesh(tensor=2), Mesh(tensor=4), Mesh(data=2, tensor=2), Mesh(data=3), Mesh()], ids=str)
def test_a_right_schedule_is_the_same(mesh):
    comparison = verify(mlp(mesh), X, steps=2)
    assert comparison.ok
    assert comparison.first is None
    assert (comparison.num_tensors, comparison.num_modules) == (4, 6)


def test_a_llama_is_the_same_with_inputs_that_are_made():
    comparison = verify(split_llama(llama(), Mesh(data=2, tensor=2)))
    assert comparison.ok, comparison
    assert comparison.notes == ()
    assert str(comparison).startswith("4 ranks (mesh pipe=1 data=2 tensor=2) beside the whole model: the same (23 tensors")


def test_it_names_the_first_module_whose_output_differs():
    comparison = verify(mlp(Mesh(tensor=2), middle=nn.Softmax(-1)), X)
    assert comparison.first.path == "middle"
    assert "its inputs agree" in comparison.first.cause
    assert kinds(comparison) == {"output", "loss", "gradient"}
    assert 0.5 < comparison.first.relative < 5
    assert "begins at middle: its output differs by" in str(comparison)


def test_a_forgotten_sum_of_gradients_is_named_with_what_ranks_hold():
    sch = create_schedule(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), Mesh(tensor=2))
    sch = sch.at["1"].shard("weight", axis=0).at["1"].shard("bias", axis=0).at["1"].set(out_features=16)
    comparison = verify(sch.at["3"].rowwise(), {"input": X["x"]})
    assert kinds(comparison) == {"gradient", "replica"}
    assert "ranks 0, 1 hold the same part of it, and have values that differ by" in str(comparison)
    assert [d.path for d in comparison.differences if d.kind == "gradient"] == ["0.bias", "0.weight"]
    assert "each rank along 'tensor' has a part of the sum, and nobody adds them" in comparison.first.cause


def test_a_sum_that_is_made_twice_is_named():
    sch = create_schedule(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), Mesh(tensor=2))
    sch = sch.at["1"].colwise().at["3"].rowwise().at["0"].sync("backward_pre", "all_reduce")
    comparison = verify(sch, {"input": X["x"]})
    assert "it is 2 times too large" in comparison.first.cause


def test_dropout_masks_are_judged():
    sch = mlp(Mesh(tensor=2), p=0.5)
    assert verify(sch.at["inner"].fork_rng(), X).ok
    found = verify(sch, X)
    assert (kinds(found), found.first.path) == ({"dropout"}, "inner")
    assert "draw the same random numbers (bernoulli) where they hold different parts" in found.first.cause
    found = verify(sch.at["{inner,outer}"].fork_rng(), X)
    assert (kinds(found), found.first.path) == ({"dropout"}, "outer")
    assert "draw different random numbers (bernoulli) where they hold the same values" in found.first.cause


def test_masks_and_the_place_of_a_difference_are_found_in_stages_too():
    sch = mlp(Mesh(pipe=2, tensor=2), p=0.5, middle=nn.Softmax(-1)).at["inner"].cut_pipeline_stage()
    found = verify(sch, X)
    assert kinds(found) == {"output", "loss", "gradient", "dropout"}
    assert found.first.path == "middle"


def waits_alone(tensor, group):
    if group.index == 0:
        dist.all_reduce(tensor, group=group.process_group)
    return tensor


def other_shape(tensor, group):
    dist.all_reduce(tensor.clone() if group.index else tensor[:1].clone(), group=group.process_group)
    return tensor


def raises(tensor, group):
    if group.index == 1:
        msg = "no such part\nat all"
        raise ValueError(msg)
    return tensor


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        (waits_alone, "collective", "rank 0 issues all_reduce(float64[6, 5, 16]) in outer; rank 1 issues none"),
        (
            other_shape,
            "collective",
            "rank 0 issues all_reduce(float64[1, 5, 16]) in outer; rank 1 issues all_reduce(",
        ),
        (raises, "error", "rank 1 raises ValueError: no such part"),
    ],
)
def test_ranks_that_part_are_named_at_once(function, kind, said):
    sch = mlp(Mesh(tensor=2)).at["outer"].sync("forward_post", function)
    found = verify(sch, X)
    assert found.first.kind == kind
    assert found.first.path == "outer"
    assert said in found.first.cause


def test_a_schedule_that_planning_refuses_is_judged_all_the_same():
    sch = create_schedule(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), Mesh(tensor=2))
    sch = sch.at["1"].shard("weight", axis=0).at["1"].shard("bias", axis=0).at["1"].set(out_features=16)
    found = verify(sch.at["3"].rowwise(), {"input": X["x"]})
    assert [problem.path for problem in found.refused] == ["1"]
    assert "plan_build refuses it" in str(found)


def test_a_loss_of_the_users_and_several_steps():
    assert verify(mlp(Mesh(tensor=2)), X, loss=lambda output: output.square().mean(), steps=3).ok


def test_frozen_tensors_have_no_gradient_and_stay():
    sch = mlp(Mesh(tensor=2))
    sch.runtime.model.up.requires_grad_(False)
    frozen = create_schedule(sch.runtime.model, Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise()
    assert verify(frozen, X).ok


def test_two_sums_of_one_gradient_follow_each_other():
    sch = create_schedule(family("mixtral"), Mesh(data=2, expert=2, tensor=2))
    sch = sch.at["model.layers.*.mlp"].sync("backward_post", "all_gather", axis=1).sync("forward_post", "all_gather", axis=1)
    sch = sch.at["model.layers.*.mlp.{gate,experts}"].sum_gradient().at["model.layers.*.mlp.experts"].expert_parallel()
    assert verify(sch, {"input_ids": torch.randint(1, 64, (6, 6))}).ok


class Casts(nn.Module):
    """Computes in single precision in the middle, with a constant of it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        hidden = self.up(x).to(torch.float32) * torch.tensor(0.1, dtype=torch.float32)
        return self.down(hidden.softmax(1, dtype=torch.float32))


def test_casts_to_less_precision_are_lifted():
    sch = create_schedule(Casts(), Mesh(tensor=2)).at["up"].colwise().at["down"].rowwise()
    found = verify(sch, X)
    assert found.ok, found
    assert (found.notes, found.tolerance) == ((), 1e-7)


def test_where_no_precision_is_to_be_had_the_tolerance_is_measured_and_told():
    model = nn.Sequential(nn.Linear(16, 32), InSingle(), nn.Linear(32, 16))
    sch = create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise()
    found = verify(sch, {"input": X["x"]})
    assert found.ok, found
    assert found.tolerance > 1e-7
    assert "compute in lower precision, and sums in another order differ by" in found.notes[0]
    wrong = create_schedule(nn.Sequential(model[0], InSingle(), nn.Softmax(-1), model[2]), Mesh(tensor=2))
    assert not verify(wrong.at["0"].colwise().at["3"].rowwise(), {"input": X["x"]}).ok


@torch.library.custom_op("shardplan_tests::tanh_in_single", mutates_args=())
def tanh_in_single(x: torch.Tensor) -> torch.Tensor:
    return x.float().tanh()


tanh_in_single.register_fake(lambda x: x.new_empty(x.shape, dtype=torch.float32))
tanh_in_single.register_autograd(
    lambda ctx, grad: grad.double() * (1 - ctx.saved_tensors[0].double() ** 2),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


class InSingle(nn.Module):
    """Computes in single precision by an operator that nobody can look into."""

    def forward(self, x):
        return tanh_in_single(x).to(x.dtype)


def numpy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002  the global generator


def test_the_process_stays_as_it_was():
    sch = mlp(Mesh(tensor=2), p=0.5)
    weight = sch.runtime.model.up.weight
    before = (weight.clone(), torch.get_rng_state(), random.getstate(), numpy_state())
    world = dist.distributed_c10d._world
    verify(sch, X)
    with pytest.raises(PlanError):
        verify(sch, {"y": X["x"]})
    after = (weight, torch.get_rng_state(), random.getstate(), numpy_state())
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert weight.grad is None
    assert torch.get_default_dtype() == torch.float32
    assert dist.distributed_c10d._world is world
    assert not dist.is_initialized()


def judged_among_ranks(rank):
    dist.all_reduce(torch.ones(1))
    ok = verify(mlp(Mesh(tensor=2)), X).ok
    total = torch.full((1,), float(rank))
    dist.all_reduce(total)
    return ok, total.item(), dist.get_world_size()


def test_ranks_of_a_job_may_verify_and_go_on():
    assert results(run_ranks(judged_among_ranks, 2)) == [(True, 1.0, 2)] * 2


def test_what_the_caller_has_around_it_does_not_matter():
    with torch.no_grad(), torch.device("meta"):
        assert verify(mlp(Mesh(tensor=2)), X).ok
