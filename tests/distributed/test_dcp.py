"""What ranks write as torch's distributed checkpoint, torch reads whole, and plans for any mesh read in parts."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from shardplan.functional import execute, plan_build, predict
from shardplan.functional.checkpoints.formats import dcp as reader
from shardplan.functional.saving.dcp import _check, write_dcp
from shardplan.specs import Checkpoint, Mesh, PlanError
from tests.distributed.test_layouts import experts, repeated
from tests.helpers.models import llama, schedule, split_llama
from tests.helpers.ranks import results, run_ranks
from tests.helpers.tensor_parts import picked
from tests.helpers.training import adamw

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

TORCH = {"target": "torch", "config": {"num_microbatches": 2}}


def two_stages(mesh):
    sch = split_llama(llama(use_cache=False, tie_word_embeddings=True), mesh)
    return sch.cut_evenly(mesh.pipe) if mesh.pipe > 1 else sch


def tied(mesh):
    return schedule("plain", mesh)


CASES = [
    (repeated, Mesh(tensor=4)),
    (repeated, Mesh(data=2, tensor=2)),
    (experts, Mesh(data=2, tensor=2, expert=2)),
    (two_stages, Mesh(pipe=2, tensor=2)),
    (tied, Mesh(tensor=2)),
    (tied, Mesh()),
]


def planned(make, mesh, *_):
    if mesh.pipe == 1:
        return plan_build(make(mesh))
    return plan_build(make(mesh), **TORCH, example_inputs={"input_ids": torch.arange(16).view(2, 8)})


def step(parameters, optimizer):
    """A step whose gradients are the weights, so that each element of a state tells whose it is."""
    for parameter in parameters:
        parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
    optimizer.step()


def write(rank, plan, make, mesh, folder):
    built = execute(
        plan, device="cpu", optimizer=adamw, loss_fn=(lambda output, _: output.logits.sum()) if plan.pipeline else None
    )
    step([p for group in built.optimizer.param_groups for p in group["params"]], built.optimizer)
    write_dcp(plan, built.model, folder, optimizer=built.optimizer)


def whole_values(make):
    """Weights and states of the unsplit model after the same step, in one process."""
    plan = planned(make, Mesh())
    built = execute(plan, device="cpu", optimizer=adamw)
    step(list(built.module.parameters()), built.optimizer)
    named = {id(tensor): path for path, tensor in built.module.named_parameters()}
    states = {named[id(parameter)]: dict(of) for parameter, of in built.optimizer.state.items()}
    return built.module.state_dict(), states


@pytest.mark.parametrize(("make", "mesh"), CASES, ids=lambda one: getattr(one, "__name__", str(one)))
def test_torch_reads_the_whole_tensors_and_states(make, mesh, tmp_path):
    folder = tmp_path / "saved"
    results(run_ranks(write, mesh.num_ranks, make, mesh, folder, shared=planned))
    weights, states = whole_values(make)
    room = {path: torch.full_like(tensor, -7) for path, tensor in weights.items()}
    room["optimizer"] = {"state": {path: {n: torch.full_like(t, -7) for n, t in of.items()} for path, of in states.items()}}
    dcp.load(room, checkpoint_id=folder, no_dist=True)
    found = room.pop("optimizer")["state"]
    for path, tensor in weights.items():
        assert torch.equal(room[path], tensor), path
    assert {n for of in states.values() for n in of} == {"exp_avg", "exp_avg_sq", "step"}
    for path, of in states.items():
        for name, tensor in of.items():
            assert torch.equal(found[path][name], tensor), (path, name)
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    one_file = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert one_file.keys() == {*weights, "optimizer"}
    assert all(torch.equal(one_file[path], tensor) for path, tensor in weights.items())

    contents = reader.read(str(folder))
    assert contents.tensors.keys() == weights.keys()
    for path, parts in contents.tensors.items():
        assert sum(prod(part.shape) for part in parts) == weights[path].numel(), path
    assert {file.name for file in contents.folder.files} <= {file.name for file in folder.iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_padding_and_repeated_heads_are_written_once(tmp_path):
    mesh = Mesh(tensor=4)
    results(run_ranks(write, 4, repeated, mesh, tmp_path / "saved", shared=planned))
    written = dcp.FileSystemReader(tmp_path / "saved").read_metadata().state_dict_metadata
    vocab, heads = written["lm_head.weight"], written["model.layers.0.self_attn.k_proj.weight"]
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in vocab.chunks] == [
        ((0, 0), (34, 64)),
        ((34, 0), (34, 64)),
        ((68, 0), (34, 64)),
        ((102, 0), (29, 64)),
    ]
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in heads.chunks] == [((0, 0), (8, 64)), ((8, 0), (8, 64))]


def load(rank, plan):
    built = execute(plan, device="cpu")
    return built.module.state_dict(), built.receipt, predict(plan, rank)


def test_what_four_ranks_wrote_two_others_read_in_parts(tmp_path):
    folder, mesh = tmp_path / "saved", Mesh(data=2, tensor=2)
    results(run_ranks(write, 4, repeated, Mesh(tensor=4), folder, shared=planned))
    weights, _ = whole_values(repeated)
    plan = plan_build(repeated(mesh), init_weights=Checkpoint(folder))
    for rank, (local, receipt, told) in enumerate(results(run_ranks(load, 4, plan))):
        assert receipt == told
        assert receipt.read_bytes < sum(tensor.nbytes for tensor in weights.values())
        for path, tensor in weights.items():
            index = plan.tree[path].index(mesh.coordinate(rank))
            part = tensor[picked(index)]
            assert torch.equal(local[path][: len(part)] if part.dim() else local[path], part), path


def write_over(rank, plan, folder):
    built = execute(plan, device="cpu")
    write_dcp(plan, built.model, folder)


def test_what_is_there_already_stays(tmp_path):
    plan = plan_build(schedule("plain", Mesh(tensor=2)))
    results(run_ranks(write_over, 2, plan, tmp_path / "saved"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    for outcome in run_ranks(write_over, 2, plan, tmp_path / "saved"):
        assert outcome.error.startswith("ExecutionError: rank 0: PlanError: 1 problem")
        assert f"{tmp_path / 'saved'}: it is there already" in outcome.error
    assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == before


def test_a_folder_of_zero_3_is_refused_by_name():
    config = {"train_batch_size": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}
    plan = plan_build(schedule("plain"), target="deepspeed", config=config)
    tensor = torch.empty(2)
    tensor.ds_id = 3
    with pytest.raises(PlanError, match=r"embed.weight .*ZeRO 3 keeps it in pieces"):
        _check(plan, {"embed.weight": tensor}, Path("/nowhere/at/all"))
