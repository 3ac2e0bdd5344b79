"""Folders that transformers wrote, on other meshes: the same logits, and saved again the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from shardplan.functional import audit, create_schedule, execute, plan_build, predict, save_checkpoint
from shardplan.functional.frontends import schedule_from_tp_plan
from shardplan.specs import Checkpoint, Mesh, dumps, loads
from tests.helpers.families import MAKERS, inputs
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks

NAMES = ("llama", "gpt2", "mixtral", "gpt_neox")
MESHES = (Mesh(), Mesh(tensor=2), Mesh(tensor=4), Mesh(pipe=2, tensor=2))
SHARD_SIZE = "20KB"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each model, in several files, and the logits of what transformers makes of it."""
    root, wanted = tmp_path_factory.mktemp("folders"), {}
    for name in NAMES:
        made(name, "cpu").save_pretrained(root / name, max_shard_size=SHARD_SIZE)
        assert len(list(Path(root, name).glob("*.safetensors"))) > 2
        wanted[name] = logits(AutoModelForCausalLM.from_pretrained(root / name, attn_implementation="eager").eval(), name)
    return root, wanted


def made(name, device="meta"):
    torch.manual_seed(1)
    if name == "llama":
        return llama(device, use_cache=False, num_key_value_heads=4)
    with torch.device(device):
        return MAKERS[name]()


def given(name):
    ids = {"input_ids": torch.arange(16).view(2, 8) % 60}
    return ids if name == "llama" else inputs(name, 0)[0]


@torch.no_grad()
def logits(model, name):
    return model(**given(name), use_cache=False).logits


def empty(folder):
    """The model of a folder, on meta, as a user makes it."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, use_cache=False)  # a pipeline gives tensors, and no cache
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def plan_of(folder, name, mesh, *_, **more):
    model = empty(folder)
    if name == "llama":
        sch = split_llama(model, mesh)
    else:
        sch = schedule_from_tp_plan(model, mesh) if getattr(model, "_tp_plan", None) else create_schedule(model, mesh)
    if mesh.pipe == 1:
        return plan_build(sch, init_weights=Checkpoint(folder, **more))
    return plan_build(
        sch.cut_evenly(mesh.pipe),
        init_weights=Checkpoint(folder, **more),
        target="torch",
        config={"num_microbatches": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.0}}},
        example_inputs=given(name),
    )


def serve(rank, planned, folder, name, mesh, out):
    """What one rank does: load, compute the logits, save."""
    plan, seen = loads(dumps(planned)), []
    report = audit(plan)
    assert report.ok, str(report)

    def loss(output, target):
        seen.append(output.logits.detach().clone())
        return cross_entropy(output.logits.flatten(0, 1), target.flatten())

    built = execute(plan, empty(folder), device="cpu", loss_fn=loss if plan.pipeline else None)
    assert built.receipt == predict(plan, rank)
    if plan.pipeline:
        ids = given(name)["input_ids"]
        built.model.eval_batch(*given(name).values(), target=ids)
        found = torch.cat(seen) if seen else None
    else:
        found = logits(built.model.eval(), name)
    save_checkpoint(plan, built.model, out)
    return found, built.receipt.reads


CASES = [
    *(("llama", mesh) for mesh in MESHES),
    *(("mixtral", mesh) for mesh in MESHES[1:]),
    *(("gpt2", mesh) for mesh in MESHES[1::2]),
    ("gpt_neox", MESHES[1]),
]


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_a_folder_of_transformers_gives_its_logits_and_comes_back_the_same(folders, name, mesh, tmp_path):
    root, wanted = folders
    arguments = root / name, name, mesh, tmp_path / "again"
    by_rank = results(run_ranks(serve, mesh.num_ranks, *arguments, shared=plan_of))
    found = [computed for computed, _ in by_rank if computed is not None]
    assert found
    for computed in found:
        torch.testing.assert_close(computed, wanted[name], rtol=1e-5, atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    assert torch.equal(logits(again, name), wanted[name])
    for file in (*Path(root, name).glob("*.safetensors"), *Path(root, name).glob("*.index.json")):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
