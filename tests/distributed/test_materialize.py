"""Files of single ranks, each made in one process without a group: ranks start from them as if they had made them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from shardplan.functional import audit, execute, from_shards, materialize, plan_build, predict, save_checkpoint
from shardplan.functional.checkpoints.formats.rank_file import rank_file_name
from shardplan.specs import Checkpoint, Mesh, PlanError, dumps, loads
from tests.helpers.models import llama, plain, split_llama, split_plain
from tests.helpers.processes import run_python
from tests.helpers.ranks import results, run_ranks

TWO = Mesh(tensor=2)


def orthogonal(module):
    """Init code for which no program stands: it needs whole tensors."""
    for parameter in module.parameters(recurse=False):
        (nn.init.orthogonal_ if parameter.dim() > 1 else nn.init.ones_)(parameter)


def from_programs(mesh, _):
    return plan_build(split_llama(llama(), mesh), seed=3)


def from_code(mesh, _):
    return plan_build(split_llama(llama(), mesh), init_weights=orthogonal)


def from_values(mesh, _):
    torch.manual_seed(5)
    return plan_build(split_plain(plain("cpu"), mesh))


def tied_over_stages(mesh, _):
    sch = split_llama(llama(tie_word_embeddings=True, use_cache=False), mesh).cut_evenly(2)
    ids = torch.zeros(1, 8, dtype=torch.long)
    config = {"num_microbatches": 2}
    return plan_build(sch, target="torch", config=config, example_inputs={"input_ids": ids}, init_weights=orthogonal)


def from_checkpoint(mesh, folder):
    if not (folder / "saved").exists():
        torch.manual_seed(7)
        whole = plan_build(split_llama(llama("cpu"), Mesh()))
        save_checkpoint(whole, execute(whole, device="cpu").model, folder / "saved")
    return plan_build(split_llama(llama(), mesh), init_weights=Checkpoint(folder / "saved"))


CASES = [
    (from_programs, TWO),
    (from_programs, Mesh(data=2, tensor=2)),
    (from_code, TWO),
    (from_values, TWO),
    (from_checkpoint, TWO),
    (tied_over_stages, Mesh(pipe=2, tensor=2)),
]


def loss(output, target):
    return output.logits.sum() + target.sum()


def state(built):
    return {path: tensor.clone() for module in built.modules for path, tensor in module.state_dict().items()}


def hold(rank, plan, mesh, folder, make):
    """Return what a rank holds when it has made its values, and when it has read them."""
    loss_fn, started = loss if plan.pipeline else None, from_shards(plan, folder)
    made = execute(plan, device="cpu", loss_fn=loss_fn)
    read = execute(started, device="cpu", loss_fn=loss_fn)
    assert read.receipt == predict(started, rank)
    assert [name for name, _ in read.receipt.reads] == [rank_file_name(rank)]
    assert not any(call.op in {"broadcast", "scatter"} for call in read.receipt.collectives)
    return state(made), state(read)


@pytest.mark.parametrize(("make", "mesh"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_ranks_that_start_from_their_files_hold_what_they_would_have_made(make, mesh, tmp_path):
    plan = make(mesh, tmp_path)
    for rank in range(mesh.num_ranks):
        assert materialize(plan, rank, tmp_path).name == rank_file_name(rank)
    started = from_shards(plan, tmp_path)
    assert audit(started).ok, str(audit(started))
    assert loads(dumps(started)) == started
    for made, read in results(run_ranks(hold, mesh.num_ranks, mesh, tmp_path, make, shared=planned)):
        assert made.keys() == read.keys()
        assert made
        assert all(torch.equal(tensor, read[path]) for path, tensor in made.items())


def planned(mesh, folder, make):
    return make(mesh, folder)


@pytest.fixture
def written(tmp_path):
    """A plan on two ranks, and the files of both."""
    plan = from_programs(TWO, tmp_path)
    for rank in range(2):
        materialize(plan, rank, tmp_path)
    return plan, tmp_path


def start(rank, text, folder):
    """Return what a rank is told when it starts from its file."""
    with pytest.raises(Exception, match=r"\w") as caught:
        execute(from_shards(loads(text), folder), llama(), device="cpu")
    return str(caught.value)


def told(plan, folder):
    first, second = results(run_ranks(start, 2, dumps(plan), folder))
    assert first == second
    return first


def test_every_flipped_bit_is_found_and_its_tensor_named(written):
    plan, folder = written
    file = folder / rank_file_name(1)
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)
    text = told(plan, folder)
    assert "rank 1" in text
    assert "it is damaged" in text
    assert any(f"  {path}: what is read of rank-00001.safetensors has the sum" in text for path in plan.tree), text


def test_a_file_of_another_plan_rank_or_length_is_refused(written):
    plan, folder = written
    other = plan_build(split_llama(llama(), TWO), seed=4)
    assert f"it is of plan {plan.fingerprint[:12]}, and this one came from {other.fingerprint[:12]}" in told(other, folder)
    shutil.copyfile(folder / rank_file_name(0), folder / rank_file_name(1))
    assert "rank 1: PlanError: 1 problem\n  rank-00001.safetensors: it is of rank 0" in told(plan, folder)
    file = folder / rank_file_name(1)
    file.write_bytes(file.read_bytes()[:-9])
    assert "rank-00001.safetensors" in told(plan, folder)
    file.unlink()
    assert "No such file" in told(plan, folder)


def test_what_was_damaged_before_it_was_materialized_is_found_by_all_ranks_together(tmp_path):
    plan = from_checkpoint(TWO, tmp_path)
    file = tmp_path / "saved" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)
    for rank in range(2):
        materialize(plan, rank, tmp_path)
    text = told(plan, tmp_path)
    assert "what is read of model.safetensors has the sum" in text
    assert json.loads((tmp_path / "saved" / "manifest.json").read_text())["tensors"]["model.safetensors"]


def test_values_of_code_need_the_model_and_values_that_are_not_there_are_told(tmp_path):
    plan = loads(dumps(from_code(TWO, tmp_path)))
    with pytest.raises(
        PlanError, match=r"its values are orthogonal, which need the model\n.*materialize\(plan, rank, folder"
    ):
        materialize(plan, 0, tmp_path)
    bare = plan_build(split_llama(llama(), TWO), init_weights=False)
    with pytest.raises(PlanError, match="it is planned without values"):
        materialize(bare, 0, tmp_path)
    assert not list(tmp_path.glob("*"))


IN_TURN = """
import sys, tempfile
import torch
from torch import nn
from shardplan.functional import create_schedule, materialize, plan_build
from shardplan.specs import Mesh

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def plan(width, num):
    model = nn.Sequential(*(nn.Linear(width, width, device="meta") for _ in range(num)))
    return plan_build(create_schedule(model, Mesh(tensor=4)).at["*"].colwise())

with tempfile.TemporaryDirectory() as folder:
    materialize(plan(64, 2), 0, folder)
    large, before = plan(2048, 16), peak()
    for rank in range(int(sys.argv[1])):
        materialize(large, rank, folder)
    print(peak() - before)
"""


def test_ranks_in_turn_need_the_memory_of_one_and_one_that_of_a_tensor():
    def peak(num_ranks):
        return int(run_python(IN_TURN, num_ranks, OMP_NUM_THREADS="1"))

    shards, one, four = 2048 * 2048 * 16, peak(1), peak(4)  # of a rank: 16 tensors of 4 bytes an element, in four parts
    assert one < shards / 4
    assert four < one + shards / 8
