"""Parameters as DTensors: the same training, seen by torch's own tools as global tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardplan.functional import (
    ExecutionError,
    as_dtensors,
    create_schedule,
    execute,
    load_optimizer,
    plan_build,
    predict,
    save_checkpoint,
)
from shardplan.specs import Checkpoint, Mesh
from tests.distributed.test_layouts import fused, sequence
from tests.helpers.models import llama, schedule, split_llama
from tests.helpers.ranks import results, run_ranks
from tests.helpers.training import BATCH, CLIP, adamw, batch, loss_of

NUM_STEPS = 3


def plain(mesh):
    return schedule("plain", mesh)


def uneven(mesh):
    """A feed-forward block whose width four ranks do not divide; heads are even."""
    sch = create_schedule(llama(intermediate_size=90), mesh)
    sch = sch.at["**.[qkv]_proj"].colwise(granule=8).at["**.o_proj"].rowwise(granule=8)
    return sch.at["**.mlp.{gate,up}_proj"].colwise(uneven=True).at["**.mlp.down_proj"].rowwise(uneven=True)


def checkpointed(mesh, *, reentrant=False):
    model = llama(use_cache=False)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return split_llama(model, mesh)


def reentrant(mesh):
    return checkpointed(mesh, reentrant=True)


class HalfWayError(RuntimeError):
    """What a module may raise."""


class Odd(nn.Module):
    """What looks at tensors of a module below it, keeps a second list of them, or puts another buffer in place."""

    def __init__(self, device="meta"):
        super().__init__()
        self.embed = nn.Embedding(16, 8, device=device)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, device=device)
        self.recurrent = nn.LSTM(8, 8, batch_first=True, device=device)
        self.head = nn.Linear(8, 16, device=device)
        self.register_buffer("count", torch.empty((), device=device))
        self.register_buffer("tallied", torch.empty((), dtype=torch.int64, device=device))
        self.fails = self.is_cut = False

    def reset_parameters(self):
        self.count.zero_()
        self.tallied.zero_()

    def forward(self, ids):
        self.count = self.count + 1
        self.tallied += 1
        seen = (*self.parameters(), *self.buffers(), *self.recurrent._flat_weights)
        assert not any(isinstance(tensor, DTensor) for tensor in seen) or self.is_cut
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        if self.fails:
            raise HalfWayError
        return nn.functional.linear(self.recurrent(x)[0], self.head.weight) + self.head(x)


def odd(mesh):
    return create_schedule(Odd(), mesh).at["embed"].vocab_parallel()


def of_both_layouts(rank, make, mesh):
    plan = plan_build(make(mesh))
    local = execute(plan, device="cpu", optimizer=adamw)
    built = execute(plan, device="cpu", optimizer=adamw, layout="dtensor")
    assert built.receipt == predict(as_dtensors(plan), rank)
    whole = check_whole(plan, built)
    vocab = next(spec for path, spec in plan.tree.items() if "embed" in path).orig_shape[0]
    for one in (local, built):
        one.module.train()
    for step in range(NUM_STEPS):
        ids = batch(step, vocab)
        losses = [loss_of(one.model, ids) for one in (local, built)]
        assert torch.equal(*losses), step
        for loss in losses:
            loss.backward()
        wanted = dict(local.module.named_parameters())
        for path, parameter in built.module.named_parameters():
            grad = parameter.grad
            assert (grad is None) == (wanted[path].grad is None), path
            if grad is not None:
                assert (grad.device_mesh, grad.placements) == (parameter.device_mesh, parameter.placements), path
                assert (grad.shape, grad.stride()) == (parameter.shape, parameter.stride()), path
                assert torch.equal(grad.to_local(), wanted[path].grad), path
        for one in (local, built):
            one.optimizer.step()
            one.optimizer.zero_grad()
    check_whole(plan, built)
    wanted |= dict(local.module.named_buffers())
    for path, tensor in (*built.module.named_parameters(), *built.module.named_buffers()):
        assert torch.equal(tensor.to_local(), wanted[path]), path
    return whole


def check_whole(plan, built):
    """Every tensor is a DTensor of the whole shape, where the plan says; returns the whole ones."""
    whole = {}
    state = {**dict(built.module.named_parameters()), **dict(built.module.named_buffers())}
    assert set(state) == set(plan.tree)
    for path, tensor in state.items():
        spec = plan.tree[path]
        assert isinstance(tensor, DTensor)
        assert isinstance(tensor, nn.Parameter) == (spec.kind == "parameter")
        assert tuple(tensor.shape) == spec.orig_shape
        assert tensor.requires_grad == (spec.requires_grad and spec.kind == "parameter")
        shard = spec.on("tensor")
        assert tensor.placements[-1] == (Shard(shard.axis) if shard and plan.mesh.tensor > 1 else Replicate()), path
        whole[path] = tensor.full_tensor().detach().clone()
        for alias in spec.tie:
            owner, _, name = alias.rpartition(".")
            assert getattr(built.module.get_submodule(owner), name) is tensor
    return whole


CASES = [
    (plain, Mesh(tensor=2)),
    (checkpointed, Mesh(tensor=2)),
    (reentrant, Mesh(tensor=2)),
    (odd, Mesh(tensor=2)),
    (sequence, Mesh(tensor=2)),
    (uneven, Mesh(tensor=4)),
]


@pytest.mark.parametrize(("make", "mesh"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_training_is_that_of_local_tensors_and_torch_sees_the_whole_ones(make, mesh):
    module = execute(plan_build(make(Mesh())), device="cpu").module
    wanted = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for whole in results(run_ranks(of_both_layouts, mesh.num_ranks, make, mesh)):
        assert set(whole) == set(wanted)
        assert all(torch.equal(whole[path], tensor) for path, tensor in wanted.items())


def of_failures(rank):
    mesh = Mesh(tensor=2)
    plan = plan_build(odd(mesh))
    built = execute(plan, device="cpu", layout="dtensor")
    built.module.fails = True
    ids = torch.arange(16).view(2, 8)
    with pytest.raises(HalfWayError):
        built.module(ids)
    check_whole(plan, built)
    assert built.module.count.full_tensor() == 1
    built.module.fails = False
    with torch.no_grad():
        built.module(ids)
    check_whole(plan, built)
    with pytest.raises(ExecutionError, match="the ranks do not have the same plan: rank 1 differs from rank 0 in its steps"):
        execute(plan, device="cpu", layout=("dtensor", "local")[rank])
    with pytest.raises(ExecutionError, match=r"rank 0: PlanError: 4 problems\n  qkv.weight .* one piece"):
        execute(plan_build(fused(mesh)), device="cpu", layout="dtensor")
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ExecutionError, match=r"weight .*it belongs to a scripted module, whose code takes no DTensor"):
        execute(plan_build(create_schedule(nn.Sequential(scripted), mesh)), device="cpu", layout="dtensor")
    return True


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_the_tensors_are_dtensors_again_after_an_error_and_what_cannot_be_is_refused_on_all_ranks():
    assert results(run_ranks(of_failures, 2)) == [True] * 2


def of_parts(rank):
    """Parts that are called by themselves: what their own hooks look at is local too."""
    mesh = Mesh(tensor=2)
    x = torch.linspace(-1, 1, 32).view(2, 16)
    for make, path, given in ((plain, "blocks.0.down", x.tile(2)), (plain, "embed", torch.arange(6)), (alike, "0", x)):
        plan = plan_build(make(mesh))
        local, built = (execute(plan, device="cpu", layout=layout).module for layout in ("local", "dtensor"))
        outputs = [module.get_submodule(path)(given) for module in (local, built)]
        assert torch.equal(*outputs), path
        for output in outputs:
            output.square().sum().backward()
        for (name, wanted), parameter in zip(local.named_parameters(), built.parameters(), strict=True):
            assert wanted.grad is None or torch.equal(parameter.grad.to_local(), wanted.grad), name
    return True


def alike(mesh):
    """A norm whose gradient is summed over ranks."""
    return create_schedule(nn.Sequential(nn.LayerNorm(16, device="meta")), mesh).at["0"].sum_gradient()


def test_a_part_that_is_called_by_itself_computes_with_local_tensors():
    assert results(run_ranks(of_parts, 2)) == [True] * 2


SPLIT = {
    "even": ((12, 5), {"axis": 0}),
    "inner": ((5, 12), {"axis": 1}),
    "interleaved": ((24, 5), {"axis": 0, "interleaved": 8}),
    "uneven": ((7, 5), {"axis": 0, "uneven": True}),
    "inner_uneven": ((5, 7), {"axis": 1, "uneven": True}),
    "some_empty": ((5, 3), {"axis": 0, "uneven": True, "allow_empty": True}),
    "whole": ((3, 3), None),
    "both": ((8, 6), {"axis": 0}),
}


class Tensors(nn.Module):
    """A tensor of each layout."""

    def __init__(self):
        super().__init__()
        for name, (shape, _) in SPLIT.items():
            self.register_parameter(name, nn.Parameter(torch.arange(float(torch.Size(shape).numel())).view(shape)))


def tensors(mesh):
    sch = create_schedule(nn.Sequential(Tensors()), mesh)
    for name, (_, split) in SPLIT.items():
        sch = sch.at[f"0.{name}"].shard(**split) if split else sch
    sch = sch.at["0.both"].shard(axis=1, mesh_axis="data")
    for mesh_axis in ("data", "tensor"):
        sch = sch.at[""].sync("forward_post", "all_gather", axis=-1, mesh_axis=mesh_axis)
    return sch


def written(rank, mesh, folder):
    plan = plan_build(tensors(mesh))
    built = execute(plan, device="cpu", layout="dtensor")
    dcp.save(built.module.state_dict(), checkpoint_id=folder)
    both, one = built.module[0].both, built.module[0].even
    assert one.device_mesh == built.device_mesh["tensor"]
    assert both.device_mesh == built.device_mesh[("data", "tensor") if mesh.data > 1 else ("tensor",)]
    assert both.placements == ((Shard(1), Shard(0)) if mesh.data > 1 else (Shard(0),))
    return check_whole(plan, built)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("mesh", [Mesh(tensor=4), Mesh(data=2, tensor=2)], ids=str)
def test_every_split_that_dtensor_can_say_is_whole_for_torch_and_in_its_files(mesh, tmp_path):
    wanted = nn.Sequential(Tensors()).state_dict()
    for whole in results(run_ranks(written, 4, mesh, str(tmp_path))):
        assert all(torch.equal(whole[path], tensor) for path, tensor in wanted.items())
    state = {path: torch.zeros_like(tensor) for path, tensor in wanted.items()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(state[path], tensor) for path, tensor in wanted.items())


def trained(rank, mesh, steps, seed, load="", save=""):
    """Train by torch's own tools alone, from a checkpoint of theirs and to one; return the losses and the whole weights."""
    plan = plan_build(split_llama(llama(), mesh), seed=seed)
    built = execute(plan, device="cpu", optimizer=adamw, layout="dtensor")
    if load:
        model, states = get_state_dict(built.module, built.optimizer)
        dcp.load({"model": model, "optimizer": states}, checkpoint_id=load)
        set_state_dict(built.module, built.optimizer, model_state_dict=model, optim_state_dict=states)
    losses = []
    for step in steps:
        loss = loss_of(built.module, batch(step, 128))
        losses.append(loss.item())
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
    if save:
        model, states = get_state_dict(built.module, built.optimizer)
        dcp.save({"model": model, "optimizer": states}, checkpoint_id=save)
    return losses, {path: parameter.full_tensor().detach() for path, parameter in built.module.named_parameters()}


def train_alone(steps, clip=None):
    module = execute(plan_build(split_llama(llama(), Mesh())), device="cpu").module
    optimizer, losses = adamw(module.parameters()), []
    for step in steps:
        loss = loss_of(module, batch(step, 128))
        losses.append(loss.item())
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses, module


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_torchs_checkpoint_of_two_ranks_goes_on_with_four_and_in_one_process(tmp_path):
    first = results(run_ranks(trained, 2, Mesh(tensor=2), range(3), 0, "", str(tmp_path)))
    then = results(run_ranks(trained, 4, Mesh(tensor=4), range(3, 6), 1, str(tmp_path)))
    wanted, _ = train_alone(range(6))
    for (before, _), (after, _) in zip(first * 2, then, strict=True):
        assert before + after == pytest.approx(wanted, rel=1e-4)
    module = execute(plan_build(split_llama(llama(), Mesh()), seed=2), device="cpu").module
    state = module.state_dict()
    dcp.load({"model": state}, checkpoint_id=tmp_path, no_dist=True)
    for path, whole in first[0][1].items():
        assert torch.equal(state[path], whole), path


def gone_on(rank, mesh, steps, layout, load, save):
    """Train from a checkpoint of ours and to one; return the losses."""
    plan = plan_build(split_llama(llama(), mesh), init_weights=Checkpoint(load) if load else True)
    built = execute(plan, device="cpu", optimizer=adamw, layout=layout)
    if load:
        load_optimizer(plan, built.model, built.optimizer, load)
    losses = []
    for step in steps:
        loss = loss_of(built.model, batch(step, 128))
        losses.append(loss.item())
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
    save_checkpoint(plan, built.model, save, optimizer=built.optimizer)
    return losses


def test_training_goes_on_from_and_to_local_tensors(tmp_path):
    mesh = Mesh(tensor=2)
    wanted, _ = train_alone(range(6))
    losses = []
    for number, layout in enumerate(("dtensor", "local", "dtensor")):
        load, save = tmp_path / str(number - 1) if number else None, tmp_path / str(number)
        ranks = results(run_ranks(gone_on, 2, mesh, range(2 * number, 2 * number + 2), layout, load, save))
        losses += ranks[0]
    assert losses == pytest.approx(wanted, rel=1e-4)


def of_fully_shard(rank, mesh, nested):
    """What one rank does; layers alone, which are gathered one by one, or the model in one go."""
    built = execute(plan_build(split_llama(llama(), mesh)), device="cpu", layout="dtensor")
    model = built.module
    for part in (*(model.model.layers if nested else ()), model):
        fully_shard(part, mesh=built.device_mesh["data"])
    optimizer, losses = adamw(model.parameters()), []
    share = BATCH // mesh.data
    at = mesh.coordinate(rank).data * share
    for step in range(NUM_STEPS):
        loss = loss_of(model, batch(step, 128)[at : at + share])
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.device_mesh == built.device_mesh
    assert down.placements == (Shard(0), Shard(1))
    return losses, {path: parameter.full_tensor().detach() for path, parameter in model.named_parameters()}


def of_looking_into_what_is_cut(rank):
    """The model computes with a tensor of a part that gathers its own: it finds no piece of it in silence."""
    built = execute(plan_build(odd(Mesh(data=2))), device="cpu", layout="dtensor")
    built.module.is_cut = True
    fully_shard(built.module.head, mesh=built.device_mesh["data"])
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        built.module(torch.arange(16).view(2, 8))
    assert all(isinstance(tensor, DTensor) for tensor in (*built.module.parameters(), *built.module.buffers()))
    return True


def test_what_fully_shard_keeps_in_pieces_is_taken_for_no_whole_tensor():
    assert results(run_ranks(of_looking_into_what_is_cut, 2)) == [True] * 2


@pytest.mark.parametrize("nested", [False, True])
def test_fully_shard_over_data_trains_as_one_process(nested):
    wanted, module = train_alone(range(NUM_STEPS), clip=CLIP)
    ranks = results(run_ranks(of_fully_shard, 4, Mesh(data=2, tensor=2), nested))
    by_step = zip(*(losses for losses, _ in ranks), strict=True)
    assert [sum(losses) / 4 for losses in by_step] == pytest.approx(wanted, rel=1e-5)
    for path, parameter in module.named_parameters():
        torch.testing.assert_close(ranks[0][1][path], parameter.detach(), rtol=1e-3, atol=1e-3)
