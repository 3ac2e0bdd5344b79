"""What an optimizer gets back: its own states and settings, by the names of the tensors, or a reason why not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, execute, load_optimizer, plan_build, save_checkpoint
from shardplan.functional.checkpoints.optimizer_states import ParamGroup, settings_for
from shardplan.specs import Mesh, PlanError


def small(device="meta", dtype=torch.float32):
    with torch.device(device):
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).to(dtype)


def executed(model=None):
    plan = plan_build(create_schedule(model or small(), Mesh()))
    return plan, execute(plan, device="cpu").model


def step(model, optimizer):
    dtype = next(model.parameters()).dtype
    model(torch.ones(3, 4, dtype=dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def groups(model, *, turned=False, **more):
    """Weights with decay, biases without."""
    weights = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.5}
    biases = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([biases, weights] if turned else [weights, biases], lr=0.1, **more)


@pytest.fixture
def saved(tmp_path):
    plan, model = executed()
    optimizer = groups(model)
    step(model, optimizer)
    save_checkpoint(plan, model, tmp_path / "saved", optimizer=optimizer)
    return plan, model, optimizer, tmp_path / "saved"


def test_settings_follow_the_tensors_and_not_the_order_of_groups(saved):
    plan, model, _, folder = saved
    turned = groups(model, turned=True)
    for group in turned.param_groups:
        group["weight_decay"], group["lr"] = 7.0, 7.0
    load_optimizer(plan, model, turned, folder)
    assert [(group["weight_decay"], group["lr"]) for group in turned.param_groups] == [(0.0, 0.1), (0.5, 0.1)]
    assert turned.param_groups[0]["betas"] == (0.9, 0.999)


def test_tensors_of_several_groups_cannot_be_one_group(saved):
    plan, model, _, folder = saved
    with pytest.raises(PlanError, match=r"group 0 trains tensors that were in several groups: 2\.weight, 2\.bias"):
        load_optimizer(plan, model, torch.optim.AdamW(model.parameters()), folder)


def test_what_was_not_trained_then_is_told(tmp_path):
    plan, model = executed()
    model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(model[2].parameters())
    step(model, optimizer)
    save_checkpoint(plan, model, tmp_path / "saved", optimizer=optimizer)
    model[0].requires_grad_(requires_grad=True)
    with pytest.raises(PlanError, match=r"0\.weight: the optimizer that was saved did not train it\n      Train what was"):
        load_optimizer(plan, model, torch.optim.AdamW(model.parameters()), tmp_path / "saved")


def test_a_learning_rate_that_is_a_tensor_is_one_again(tmp_path):
    plan, model = executed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))
    step(model, optimizer)
    save_checkpoint(plan, model, tmp_path / "saved", optimizer=optimizer)
    other = torch.optim.AdamW(model.parameters(), lr=torch.tensor(9.0))
    load_optimizer(plan, model, other, tmp_path / "saved")
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor)
    assert other.param_groups[0]["lr"].item() == 0.25


def test_states_keep_their_dtype(tmp_path):
    plan, model = executed(small(dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    for state in optimizer.state.values():
        state["exp_avg"] = torch.full_like(state["exp_avg"], 1 / 3, dtype=torch.float32)
    save_checkpoint(plan, model, tmp_path / "saved", optimizer=optimizer)
    other = torch.optim.AdamW(model.parameters())
    load_optimizer(plan, model, other, tmp_path / "saved")
    for parameter, state in optimizer.state.items():
        for name, tensor in state.items():
            assert torch.equal(other.state[parameter][name], tensor)
            assert other.state[parameter][name].dtype == tensor.dtype


def test_states_that_are_incomplete_are_told(saved):
    plan, model, _, folder = saved
    from safetensors.torch import load_file, save_file

    states = load_file(folder / "optimizer.safetensors")
    del states["exp_avg_sq/2.weight"]
    save_file(states, folder / "optimizer.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["tensors"]["optimizer.safetensors"]["exp_avg_sq/2.weight"]
    manifest["files"]["optimizer.safetensors"] = (folder / "optimizer.safetensors").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PlanError, match=r"2\.weight: of its states exp_avg_sq is not there\n      Save again"):
        load_optimizer(plan, model, groups(model), folder)


@pytest.mark.parametrize("training", [5, {"groups": 5}, {"groups": [1]}, {"groups": [{"settings": 1, "paths": []}]}])
def test_a_manifest_that_says_nonsense_is_refused(saved, training):
    plan, model, optimizer, folder = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "training": training}))
    with pytest.raises(PlanError, match="damaged"):
        load_optimizer(plan, model, optimizer, folder)


def test_what_has_no_states_says_so(saved, tmp_path):
    plan, model, optimizer, _ = saved
    save_checkpoint(plan, model, tmp_path / "bare")
    for folder, told in (
        ("bare", "it holds no states of an optimizer\n      Save it with"),
        ("none", "there is no such folder"),
    ):
        with pytest.raises(PlanError, match=told):
            load_optimizer(plan, model, optimizer, tmp_path / folder)
    save_checkpoint(plan, model, tmp_path / "dcp", optimizer=optimizer, format="dcp")
    with pytest.raises(
        PlanError, match=r"a distributed checkpoint, whose states torch\.distributed\.checkpoint\.load reads"
    ):
        load_optimizer(plan, model, optimizer, tmp_path / "dcp")


@pytest.mark.parametrize("wrong", [None, nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_told(saved, wrong):
    plan, model, _, folder = saved
    with pytest.raises(PlanError, match=r"optimizer: it is a (NoneType|Linear), not an optimizer"):
        load_optimizer(plan, model, wrong, folder)
    with pytest.raises(TypeError, match=r"the plan comes first, and this is a Sequential: save_checkpoint\(plan, model"):
        save_checkpoint(model, plan, folder)


def test_another_optimizer_is_told(saved):
    plan, model, _, folder = saved
    parameters = [group["params"] for group in groups(model).param_groups]
    other = torch.optim.SGD([{"params": some} for some in parameters], lr=0.1)
    with pytest.raises(
        PlanError, match=r"group 0 has not the settings that were saved: one of the two lacks amsgrad, betas"
    ):
        load_optimizer(plan, model, other, folder)


def test_a_group_without_tensors_here_takes_the_settings_of_its_place():
    saved = (ParamGroup({"lr": 1.0}, ("a",)), ParamGroup({"lr": 2.0}, ("b",)))
    settings, problems = settings_for(saved, (ParamGroup({"lr": 0.0}, ("b",)), ParamGroup({"lr": 0.0}, ())))
    assert [group["lr"] for group in settings] == [2.0, 2.0]
    assert not problems


def test_a_folder_that_was_saved_again_is_not_called_damaged(saved):
    from shardplan.specs import Checkpoint

    plan, model, optimizer, folder = saved
    planned = plan_build(create_schedule(small(), Mesh()), init_weights=Checkpoint(folder))
    step(model, optimizer)
    save_checkpoint(plan, model, folder, optimizer=optimizer)
    with pytest.raises(PlanError, match=r"was saved again after the plan was made: it has other values than were planned\n"):
        execute(planned, device="cpu")
