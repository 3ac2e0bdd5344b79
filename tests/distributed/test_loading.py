"""Every rank reads what it keeps of a checkpoint, as from_pretrained has it, and no other byte; all ranks tell of damage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from shardplan.functional import audit, create_schedule, execute, plan_build, predict
from shardplan.functional.checkpoints.checksum import position_sum
from shardplan.functional.checkpoints.formats.safetensors import read_header
from shardplan.specs import Checkpoint, Mesh, PlanError, dumps, loads
from tests.helpers.models import llama, split_llama
from tests.helpers.ranks import results, run_ranks
from tests.helpers.tensor_parts import picked, without_padding

MESHES = [
    (Mesh(), False),
    (Mesh(tensor=2), False),
    (Mesh(tensor=4), False),
    (Mesh(data=2), False),
    (Mesh(data=2), True),
    (Mesh(data=2, tensor=2), True),
]


def write_manifest(folder):
    """What a folder that was saved here says of itself."""
    names = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    sums = {}
    for name in names:
        content = np.fromfile(Path(folder) / name, np.uint8)
        for key, one in read_header(str(folder), name)[1].items():
            size = int(np.prod(one.shape)) * one.item_bytes
            raw = content[one.offset : one.offset + size].copy().view(f"u{one.item_bytes}")
            sums.setdefault(name, {})[key] = f"{position_sum(raw):016x}"
    files = {name: (Path(folder) / name).stat().st_size for name in names}
    told = {"format": "shardplan checkpoint 1", "files": files, "tensors": sums}
    (Path(folder) / "manifest.json").write_text(json.dumps(told))


@pytest.fixture(params=["plain", "with a manifest"])
def folder(tmp_path, request):
    torch.manual_seed(1)
    llama("cpu").save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    if request.param == "with a manifest":
        write_manifest(tmp_path / "llama")
    return tmp_path / "llama"


def plan_of(folder, mesh, dtype=None, **wishes):
    model = llama() if dtype is None else llama().to(dtype)
    return plan_build(split_llama(model, mesh), init_weights=Checkpoint(folder, **wishes))


def load(rank, text):
    plan = loads(text)
    model = llama().to(next(getattr(torch, spec.dtype) for spec in plan.tree.values() if spec.kind == "parameter"))
    built = execute(plan, model, device="cpu", progress=False)
    return {path: tensor.detach().clone() for path, tensor in built.module.state_dict().items()}, built.receipt


@pytest.mark.parametrize(("mesh", "dedupe"), MESHES, ids=str)
def test_each_rank_has_its_part_of_what_from_pretrained_gives_and_read_as_many_bytes(folder, mesh, dedupe):
    plan = plan_of(folder, mesh, dedupe=dedupe)
    whole = LlamaForCausalLM.from_pretrained(folder).state_dict()
    report, together = audit(plan), 0
    for rank, (local, receipt) in enumerate(results(run_ranks(load, mesh.num_ranks, dumps(plan)))):
        here = mesh.coordinate(rank)
        for path in whole:
            assert torch.equal(local[path], whole[path][picked(plan.tree[path].index(here))]), path
        assert receipt == predict(plan, rank)
        kept = sum(plan.tree[path].local_bytes(here) for path in plan.tree if path in whole)
        assert receipt.read_bytes == (kept if here.data == 0 or not dedupe else 0)
        told = {read.file: read.num_bytes for read in report.reads if read.coordinate == report.distinct.like(here)}
        assert dict(receipt.reads) == told
        together += receipt.read_bytes
    if dedupe:
        assert mesh.tensor > 1 or together == sum(spec.num_bytes for path, spec in plan.tree.items() if path in whole)
    assert f"{len(plan.folder.files)} files of" in str(report)
    has_sums = (folder / "manifest.json").exists()
    assert ("all_reduce" in {call.op for call in receipt.collectives}) is (has_sums and mesh.num_ranks > 1)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tensor=2)], ids=str)
def test_what_is_stored_otherwise_is_converted(folder, mesh):
    plan = plan_of(folder, mesh, torch.bfloat16)
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for rank, (local, receipt) in enumerate(results(run_ranks(load, mesh.num_ranks, dumps(plan)))):
        here = mesh.coordinate(rank)
        for path in whole:
            assert torch.equal(local[path], whole[path][picked(plan.tree[path].index(here))]), path
        assert receipt == predict(plan, rank)
        assert receipt.read_bytes == 2 * sum(plan.tree[path].local_bytes(here) for path in plan.tree if path in whole)


def plan_padded(folder, mesh):
    sch = create_schedule(llama(vocab_size=130), mesh).at[""].trust("nothing is computed here")
    sch = sch.at["{lm_head,model.embed_tokens}.weight"].expect(2).shard(axis=0, pad_to_multiple=mesh.tensor)
    sch = sch.at["model.layers.*.self_attn.k_proj.weight"].expect(2).shard(axis=0, granule=16, replicate=True)
    sch = sch.at["model.norm.weight"].shard(axis=0, uneven=True)
    # two of four ranks hold the second block's granules first, and all of them those of the first
    sch = sch.at["model.layers.*.mlp.up_proj.weight"].shard(axis=0, blocks=(64, 32), granule=16, replicate=True)
    for path in (
        "model.layers.*.mlp.up_proj",
        "lm_head",
        "model.embed_tokens",
        "model.norm",
        "model.layers.*.self_attn.k_proj",
    ):
        sch = sch.at[path].silence("SP010", reason="nothing is computed here")
    return plan_build(sch, init_weights=Checkpoint(folder))


def load_padded(rank, folder, mesh):
    plan = plan_padded(folder, mesh)
    built = execute(plan, device="cpu", progress=False)
    assert built.receipt == predict(plan, rank)
    return {path: tensor.detach().clone() for path, tensor in built.module.state_dict().items()}, built.receipt


def test_padding_is_zeros_and_repeated_granules_count_once(tmp_path):
    torch.manual_seed(1)
    llama("cpu", vocab_size=130).save_pretrained(tmp_path, max_shard_size="40KB")
    write_manifest(tmp_path)
    mesh = Mesh(data=2, tensor=4)
    plan = plan_padded(tmp_path, mesh)
    assert plan.tree["lm_head.weight"].local_shape(mesh.coordinate(7)) == (33, 64)
    whole = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for rank, (local, receipt) in enumerate(results(run_ranks(load_padded, 8, tmp_path, mesh))):
        kept = 0
        for path in whole:
            index = plan.tree[path].index(mesh.coordinate(rank))
            assert torch.equal(without_padding(local[path], index), whole[path][picked(index)]), path
            kept += whole[path][picked(index)].nbytes
        assert receipt.read_bytes == kept


def plan_stages(folder):
    sch = split_llama(llama(tie_word_embeddings=True, use_cache=False), Mesh(pipe=2, tensor=2)).cut_evenly(2)
    return plan_build(
        sch,
        init_weights=Checkpoint(folder),
        target="torch",
        config={"num_microbatches": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.0}}},
        example_inputs={"input_ids": torch.zeros(2, 8, dtype=torch.int64)},
    )


def load_stages(rank, planned, folder):
    plan = loads(dumps(planned))
    assert plan.tree["model.embed_tokens.weight"].places(plan.mesh) == (0, 1)
    built = execute(
        plan,
        llama(tie_word_embeddings=True, use_cache=False),
        device="cpu",
        progress=False,
        loss_fn=torch.nn.functional.mse_loss,
    )
    assert built.receipt == predict(plan, rank)
    return built.receipt


def test_what_several_stages_hold_counts_once(tmp_path):
    torch.manual_seed(1)
    llama("cpu", tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="40KB")
    write_manifest(tmp_path)
    for receipt in results(run_ranks(load_stages, 4, tmp_path, shared=plan_stages)):
        assert "all_reduce" in {call.op for call in receipt.collectives}
    name = flip(tmp_path, "model.embed_tokens.weight", 0)
    for outcome in run_ranks(load_stages, 4, tmp_path, shared=plan_stages):
        assert "1 problem" in outcome.error
        assert f"model.embed_tokens.weight: what is read of {name} has the sum" in outcome.error


def flip(folder, path, bit):
    """Flip a bit of the first file that has a tensor."""
    for name in sorted(file.name for file in Path(folder).glob("*.safetensors")):
        tensors = read_header(str(folder), name)[1]
        if path in tensors:
            with (folder / name).open("r+b") as file:
                file.seek(tensors[path].offset + bit // 8)
                (byte,) = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1 << bit % 8]))
            return name
    raise AssertionError(path)


DAMAGED = ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight")


@pytest.mark.parametrize(("mesh", "dedupe"), [MESHES[0], MESHES[2], MESHES[5]], ids=str)
def test_flipped_bits_are_told_on_all_ranks_with_files_and_tensors(folder, mesh, dedupe):
    write_manifest(folder)
    plan = plan_of(folder, mesh, dedupe=dedupe)
    names = [flip(folder, path, 8 * 4 * 17 + 5) for path in DAMAGED]
    for outcome in run_ranks(load, mesh.num_ranks, dumps(plan)):
        assert "2 problems" in outcome.error
        for path, name in zip(DAMAGED, names, strict=True):
            assert f"{path}: what is read of {name} has the sum" in outcome.error


def load_within(rank, text, roots):
    """Load what lies in another place for each rank."""
    os.chdir(roots[rank])
    return load(rank, text)


def test_a_rank_that_fails_is_told_by_all_and_no_sums_are_compared(folder, tmp_path, monkeypatch):
    write_manifest(folder)
    copytree(folder, tmp_path / "damaged" / folder.name)
    monkeypatch.chdir(tmp_path)
    plan = plan_of(folder.name, Mesh(tensor=2))
    first = plan.folder.files[0]
    os.truncate(tmp_path / "damaged" / folder.name / first.name, first.num_bytes - 8)
    for outcome in run_ranks(load_within, 2, dumps(plan), (tmp_path, tmp_path / "damaged")):
        assert "rank 1" in outcome.error
        assert (
            f"{first.name} cannot be read: it has {first.num_bytes - 8} bytes, and {first.num_bytes} were" in outcome.error
        )
        assert "has the sum" not in outcome.error


def test_one_process_checks_too(folder):
    write_manifest(folder)
    plan = plan_of(folder, Mesh())
    execute(plan, llama(), device="cpu", progress=False)
    name = flip(folder, DAMAGED[1], 3)
    with pytest.raises(PlanError, match=f"model.norm.weight: what is read of {name} has the sum"):
        execute(plan, llama(), device="cpu", progress=False)
