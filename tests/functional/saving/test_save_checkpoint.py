"""Folders that one process saves: what save_pretrained writes, byte for byte; and nothing of others is ever replaced."""

from __future__ import annotations

import json
import os
import random
import re
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shardplan.functional import create_schedule, execute, gather, plan_build, save_checkpoint
from shardplan.functional.checkpoints.detect import read_contents
from shardplan.functional.checkpoints.formats.safetensors import DTYPES
from shardplan.functional.saving import atomic, file_plan
from shardplan.functional.saving.safetensors import bytes_of, file_layout
from shardplan.specs import Checkpoint, Mesh, PlanError
from tests.helpers.families import MAKERS
from tests.helpers.models import Plain, llama

FAMILIES = ("llama", "gpt2", "mixtral", "gpt_neox", "qwen2_moe", "deepseek_v3", "t5")
WEIGHTS = re.compile(r".*\.safetensors|.*\.index\.json")


def built(model, **wishes):
    """A plan of a model that has values, executed in this process."""
    plan = plan_build(create_schedule(model, Mesh()), **wishes)
    return plan, execute(plan, device="cpu", progress=False)


def files(folder, pattern=WEIGHTS):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if pattern.fullmatch(path.name)}


def made(name):
    torch.manual_seed(1)
    return MAKERS[name]()


@pytest.mark.parametrize("size", [50_000_000_000, 20_000])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_are_those_of_save_pretrained(name, size, tmp_path, monkeypatch):
    monkeypatch.setattr(file_plan, "MAX_FILE_BYTES", size)
    model = made(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    plan, result = built(model)
    save_checkpoint(plan, result.model, tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert ("model.safetensors" in files(tmp_path / "ours")) is (size > 20_000)
    again = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[path], tensor) for path, tensor in model.state_dict().items())
    ours, theirs = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs
    assert not list(tmp_path.glob(".*"))


def test_what_was_read_is_written_to_the_same_files(tmp_path):
    made("mixtral").save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "theirs"))
    plan, result = built(model, init_weights=Checkpoint(tmp_path / "theirs"))
    save_checkpoint(plan, result.model, tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert len(files(tmp_path / "ours")) > 3


def test_a_plain_module_is_saved_by_its_paths_and_tied_tensors_once(tmp_path):
    torch.manual_seed(1)
    model = Plain()
    plan, result = built(model)
    save_checkpoint(plan, result.model, tmp_path / "ours")
    whole = model.state_dict()
    del whole["head.weight"]  # it is embed.weight
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == whole.keys() == dict(gather(plan, result.model)).keys()
    for path, tensor in gather(plan, result.model):
        assert torch.equal(tensor, whole[path])
        assert torch.equal(found[path], whole[path])
    assert files(tmp_path / "ours", re.compile(".*")).keys() == {"model.safetensors", "manifest.json"}


class Odd(nn.Module):
    """Tensors without axes, without elements, of many dtypes, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.none = nn.Parameter(torch.empty(0, 4))
        for name in DTYPES.values():
            dtype = getattr(torch, name)
            self.register_buffer(f"all_{name}", torch.arange(15).remainder(2).view(3, 5).to(dtype))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x):
        return x * self.scale


def test_tensors_of_all_kinds_come_back(tmp_path):
    model = Odd()
    plan, result = built(model)
    save_checkpoint(plan, result.model, tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    whole = model.state_dict()
    assert found.keys() == whole.keys()
    for key, tensor in whole.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert bytes(bytes_of(found[key])) == bytes(bytes_of(tensor))
    assert files(tmp_path / "ours") == {"model.safetensors": save(whole, {"format": "pt"})}


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4).filter(lambda key: key != "__metadata__"),
        st.tuples(st.sampled_from([*DTYPES.values()]), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
        max_size=6,
    ),
    st.sampled_from([{}, {"format": "pt"}]),
)
def test_a_file_is_laid_out_as_the_safetensors_library_does(types, metadata):
    tensors = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (dtype, shape) in types.items()}
    where = file_layout(types, metadata)
    written = where.header + b"".join(bytes(bytes_of(tensors[key])) for key in where.starts)
    assert written == save(tensors, metadata or None)
    assert where.num_bytes == len(written)


def test_dtypes_that_the_format_has_no_name_for_are_refused_before_anything_is_written(tmp_path):
    model = nn.Linear(2, 2, dtype=torch.complex128)
    plan, result = built(model)
    with pytest.raises(PlanError, match=r"weight: safetensors has no name for the dtype complex128\n.*format=\"dcp\""):
        save_checkpoint(plan, result.model, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small():
    torch.manual_seed(1)
    return built(nn.Linear(4, 3))


def test_a_folder_that_was_saved_is_replaced_and_an_empty_one_filled(small, tmp_path):
    plan, result = small
    (tmp_path / "ours").mkdir()
    save_checkpoint(plan, result.model, tmp_path / "ours")
    (tmp_path / "ours" / "beside.txt").write_text("somebody's")
    with torch.no_grad():
        result.module.weight.fill_(7.0)
    save_checkpoint(plan, result.model, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert (tmp_path / "ours" / "beside.txt").read_text() == "somebody's"
    assert (load_file(tmp_path / "ours" / "model.safetensors")["weight"] == 7).all()


def test_leftovers_of_a_process_that_was_killed_are_removed(small, tmp_path):
    plan, result = small
    (tmp_path / ".ours.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".ours.partial" / "model.safetensors").write_text("half of it")
    save_checkpoint(plan, result.model, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert files(tmp_path / "ours", re.compile(".*")).keys() == {"model.safetensors", "manifest.json"}


def fill(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def hub(path):
    llama("cpu").save_pretrained(path)


def link(path):
    path.with_name("other").mkdir()
    path.symlink_to("other")


@pytest.mark.parametrize(
    ("put", "cause"),
    [
        (fill, "it is there with other things in it (thesis.tex), which nobody wrote here: it has no manifest.json"),
        (hub, "it is there with other things in it (config.json, generation_config.json, model.safetensors), which nobody"),
        (Path.touch, "it is there, and is no folder"),
        (link, "it is a link to other\n      Save under"),
    ],
)
def test_what_was_not_saved_here_is_never_replaced(small, tmp_path, put, cause):
    plan, result = small
    put(tmp_path / "ours")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(PlanError, match=re.escape(cause)) as caught:
        save_checkpoint(plan, result.model, tmp_path / "ours")
    assert "Save under another name" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def test_what_comes_to_the_folder_while_it_is_saved_is_not_replaced(tmp_path):
    partial = atomic.begin_folder(tmp_path / "ours")
    (partial / "manifest.json").write_text("{}")
    fill(tmp_path / "ours")
    with pytest.raises(PlanError, match=r"thesis\.tex"):
        atomic.finish_folder(tmp_path / "ours")
    assert (tmp_path / "ours" / "thesis.tex").exists()


def test_where_folders_cannot_be_exchanged_a_new_name_is_asked_for(small, tmp_path, monkeypatch):
    plan, result = small
    save_checkpoint(plan, result.model, tmp_path / "ours")
    before = files(tmp_path / "ours", re.compile(".*"))
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # a C library without renameat2
    with pytest.raises(PlanError, match=r"cannot exchange folders at once: .*there is no renameat2"):
        save_checkpoint(plan, result.model, tmp_path / "ours")
    assert files(tmp_path / "ours", re.compile(".*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    save_checkpoint(plan, result.model, tmp_path / "new")
    assert files(tmp_path / "new", re.compile(".*")) == before


def test_a_disk_without_room_leaves_what_was_there(tmp_path):
    plan, result = built(nn.Linear(400, 300))
    save_checkpoint(plan, result.model, tmp_path / "ours")
    before = files(tmp_path / "ours", re.compile(".*"))
    with torch.no_grad():
        result.module.weight.zero_()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(plan, result.model, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path / "ours", re.compile(".*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_another_model_than_the_planned_one_is_refused(small, tmp_path):
    plan, _ = small
    with pytest.raises(PlanError, match=r"weight .*: the model has float32\[5, 4\] on this rank, and the plan f32\[3, 4\]"):
        save_checkpoint(plan, nn.Linear(4, 5), tmp_path / "ours")
    with pytest.raises(PlanError, match=r"bias .*the model does not have it on this rank"):
        save_checkpoint(plan, nn.Linear(4, 3, bias=False), tmp_path / "ours")
    with pytest.raises(PlanError, match="it is on meta, and has no values"):
        next(gather(plan, nn.Linear(4, 3, device="meta")))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A Llama in several files that was saved here; and a plan that reads it."""
    monkeypatch.setattr(file_plan, "MAX_FILE_BYTES", 20_000)
    plan, result = built(made("llama"))
    save_checkpoint(plan, result.model, tmp_path / "ours")
    return tmp_path / "ours"


def plan_of(folder):
    with torch.device("meta"):
        model = MAKERS["llama"]()
    return plan_build(create_schedule(model, Mesh()), init_weights=Checkpoint(folder))


def stored(folder, key):
    return read_contents(str(folder)).tensors[key][0].stored


def cut_off(folder):
    one = stored(folder, "model.layers.1.mlp.up_proj.weight")
    os.truncate(folder / one.file, one.offset + 40)
    return one.file, keys_of(folder, one.file), "bytes"


def exchange_files(folder):
    first, second = sorted(path for path in folder.glob("*.safetensors"))[:2]
    keys = keys_of(folder, first.name)
    at_first, at_second = first.read_bytes(), second.read_bytes()
    first.write_bytes(at_second)
    second.write_bytes(at_first)
    return first.name, keys, ""


def remove(folder):
    one = stored(folder, "model.norm.weight")
    (folder / one.file).unlink()
    return one.file, keys_of(folder, one.file), ""


def keys_of(folder, name):
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return [key for key in places if places[key] == name]


def exchange_tensors(folder):
    """Two tensors of one shape, with all headers and lengths as they were."""
    keys = ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    pair = [stored(folder, key) for key in keys]
    content = []
    for one in pair:
        with (folder / one.file).open("rb") as file:
            file.seek(one.offset)
            content.append(file.read(8 * 32 * 4))
    for one, other in zip(pair, reversed(content), strict=True):
        with (folder / one.file).open("r+b") as file:
            file.seek(one.offset)
            file.write(other)
    return pair[0].file, [pair[0].key], "has the sum"


def flip_a_bit(folder):
    one = stored(folder, "model.norm.weight")
    with (folder / one.file).open("r+b") as file:
        file.seek(one.offset + 4 * 31 + 3)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return one.file, [one.key], "has the sum"


@pytest.mark.parametrize("damage", [cut_off, exchange_files, exchange_tensors, flip_a_bit, remove])
@pytest.mark.parametrize("when", ["before it is planned", "after"])
def test_damage_is_told_with_file_and_tensor(saved, damage, when):
    plan = plan_of(saved)
    execute(plan, device="cpu", progress=False)
    file, keys, cause = damage(saved)
    with pytest.raises(PlanError) as caught:
        execute(plan_of(saved) if when == "before it is planned" else plan, device="cpu", progress=False)
    assert file in str(caught.value)
    assert cause in str(caught.value)
    assert any(key in str(caught.value) for key in keys)


def test_any_bit_that_flips_after_planning_is_told(saved):
    plan = plan_of(saved)
    rng = random.Random(0)
    for path in sorted(saved.glob("*.safetensors")):
        whole = path.read_bytes()
        for _ in range(10):
            place = rng.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(PlanError, match=re.escape(path.name)):
                execute(plan, device="cpu", progress=False)
        path.write_bytes(whole)
    execute(plan, device="cpu", progress=False)


def tiny():
    plan = plan_build(create_schedule(nn.Linear(2, 2, device="meta"), Mesh()))
    return plan, execute(plan, device="cpu").model


def test_a_folder_with_the_manifest_of_something_else_is_left_alone(tmp_path):
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (site / "manifest.json").write_text('{"name": "a page"}')
    (site / "sub" / "data").write_text("mine")
    with pytest.raises(PlanError, match=r"which nobody wrote here: it has no manifest\.json of ours\n"):
        save_checkpoint(*tiny(), site)
    assert (site / "sub" / "data").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"]


def test_what_somebody_put_beside_the_weights_stays(tmp_path):
    plan, model = tiny()
    folder = tmp_path / "last"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save_checkpoint(plan, model, folder, optimizer=optimizer)
    (folder / "tokenizer.json").write_text("words")
    (folder / "samples").mkdir()
    (folder / "samples" / "one.txt").write_text("text")
    (folder / "latest").symlink_to("samples")
    save_checkpoint(plan, model, folder)
    assert (folder / "tokenizer.json").read_text() == "words"
    assert (folder / "latest" / "one.txt").read_text() == "text"
    assert (folder / "latest").is_symlink()
    assert not (folder / "optimizer.safetensors").exists()
    assert read_contents(str(folder))


def test_states_are_not_written_over_weights(tmp_path):
    with torch.device("cpu"):
        llama().to_empty(device="cpu").save_pretrained(tmp_path / "hub", max_shard_size="40KB")
    index = tmp_path / "hub" / "model.safetensors.index.json"
    first = min((tmp_path / "hub").glob("*.safetensors"))
    first.rename(first.with_name("optimizer.safetensors"))
    index.write_text(index.read_text().replace(first.name, "optimizer.safetensors"))
    plan = plan_build(create_schedule(llama(), Mesh()), init_weights=Checkpoint(tmp_path / "hub"))
    model = execute(plan, device="cpu").model
    with pytest.raises(PlanError, match=r"optimizer\.safetensors: weights were read from a file of this name"):
        save_checkpoint(plan, model, tmp_path / "last", optimizer=torch.optim.SGD(model.parameters()))
    assert not (tmp_path / "last").exists()


def test_the_folder_of_this_process_is_not_exchanged(tmp_path, monkeypatch):
    (tmp_path / "runs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "here")
    for folder in (".", "..", tmp_path / "runs"):
        with pytest.raises(PlanError, match="it is the folder in which this process runs, or holds that"):
            save_checkpoint(*tiny(), folder)
    save_checkpoint(*tiny(), "last")
    assert (tmp_path / "runs" / "here" / "last" / "manifest.json").exists()
