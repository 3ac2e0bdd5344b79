"""Folders of torch's distributed checkpoint: what is in them, where, and what is wrong with damaged ones."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from contextlib import suppress
from math import prod

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from shardplan.functional import execute, plan_build
from shardplan.functional.checkpoints.detect import read_contents
from shardplan.functional.checkpoints.formats.torch_save import read_saved
from shardplan.specs import Checkpoint, Mesh, PlanError
from tests.helpers.checkpoint_folders import put_together
from tests.helpers.models import plain, schedule
from tests.helpers.processes import run_python

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "half": torch.arange(5).to(torch.bfloat16),
    "eighth": torch.arange(6.0).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "complex": torch.tensor([1 + 2j, 3 - 1j]),
    "parameter": nn.Parameter(torch.arange(4.0)),
    "columns": torch.arange(12.0).reshape(3, 4)[:, 1:3],
    "empty": torch.empty(0, 4),
}


def save(state, folder):
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def values(folder):
    """What the parts of a folder make, read by plain slicing of the files."""

    def tensor_of(stored):
        data = (folder / stored.file).read_bytes()
        size = stored.item_bytes * prod(stored.shape)
        raw = bytearray(data[stored.offset : stored.offset + size])
        return torch.frombuffer(raw, dtype=getattr(torch, stored.dtype)).reshape(stored.shape)

    found = {}
    for key, parts in read_contents(str(folder)).tensors.items():
        ends = zip(*[[a + s for a, s in zip(part.at, part.shape, strict=True)] for part in parts], strict=True)
        shape = tuple(max(end) for end in ends)
        found[key] = put_together(shape, parts, tensor_of) if 0 not in shape else torch.empty(shape)
    return found


def check(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert as_bytes(found[key]) == as_bytes(tensor), key


def as_bytes(tensor):
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def problems(folder):
    with pytest.raises(PlanError) as caught:
        read_contents(str(folder))
    return caught.value.problems


def test_all_kinds_of_tensors_and_nothing_else(tmp_path):
    folder = save({**TENSORS, "number": 3, "text": "x", "module": {"a": None}}, tmp_path / "saved")
    check(values(folder), TENSORS)
    first, *others = read_contents(str(folder)).folder.files
    assert (first.name, first.num_bytes) == (".metadata", (folder / ".metadata").stat().st_size)
    assert len(first.digest) == 64
    assert [(file.name, file.digest) for file in others] == [("__0_0.distcp", "")]


class App:
    """What tutorials save: a ``Stateful`` with the model and its optimizer."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        raise AssertionError(state)


def test_the_model_is_found_wherever_it_was_in_what_was_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wanted = dict(model.state_dict())
    average = {path: tensor * 2 for path, tensor in wanted.items()}
    states = {
        "alone": model.state_dict(),
        "beside the optimizer": {"model": model.state_dict(), "optim": optimizer.state_dict()},
        "under another name": {"net": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
        "a stateful": {"app": App(model, optimizer)},
        "two models": {"model": model.state_dict(), "ema": average, "step": torch.tensor(3)},
        "flat, with an optimizer": {**model.state_dict(), "optimizer": optimizer.state_dict()},
    }
    for name, state in states.items():
        check(values(save(state, tmp_path / name)), wanted)
    (problem,) = problems(save({"a": model.state_dict(), "b": average}, tmp_path / "both"))
    assert problem.path == str(tmp_path / "both")
    assert problem.cause == "it has tensors under 'a' and 'b', and nothing says which are the model's"


def test_a_plan_reads_what_torch_saved(tmp_path):
    model = plain("cpu")
    folder = save({"model": model.state_dict()}, tmp_path / "saved")
    plan = plan_build(schedule("plain", Mesh()), init_weights=Checkpoint(folder))
    found = execute(plan, device="cpu").module.state_dict()
    assert all(torch.equal(found[path], tensor) for path, tensor in model.state_dict().items())
    assert [file.name for file in plan.folder.files] == ["__0_0.distcp"]


def test_several_files(tmp_path):
    folder = tmp_path / "saved"
    writer = dcp.FileSystemWriter(folder, thread_count=3, single_file_per_rank=False)
    dcp.save(dict(TENSORS), storage_writer=writer, no_dist=True)
    assert len(list(folder.glob("*.distcp"))) == len(TENSORS)
    check(values(folder), TENSORS)


def rewrite(folder, change):
    """Let ``change`` change the metadata."""
    metadata = FileSystemReader(folder).read_metadata()
    metadata = change(metadata) or metadata
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def infos(metadata, key):
    return [info for index, info in metadata.storage_data.items() if index.fqn == key]


@pytest.fixture
def folder(tmp_path):
    return save({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(8.0)}, tmp_path / "saved")


def test_files_that_are_cut_off_or_missing_are_named_with_the_tensor(folder):
    name, size = "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size
    os.truncate(folder / name, size - 10)
    (problem,) = problems(folder)
    assert problem.path == name
    assert f"and it has {size - 10} (tensor 'b', at [0])" in problem.cause
    (folder / name).unlink()
    assert [(one.path, one.cause.split(":")[0]) for one in problems(folder)] == [(name, "No such file or directory")] * 2
    assert ["'a'" in one.cause or "'b'" in one.cause for one in problems(folder)] == [True, True]
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-40])
    assert problems(folder)[0].path == ".metadata"


def test_tensors_that_are_elsewhere_than_told_are_named(folder):
    def exchange(metadata):
        (a,), (b,) = infos(metadata, "a"), infos(metadata, "b")
        a.offset, a.length, b.offset, b.length = b.offset, b.length, a.offset, a.length

    rewrite(folder, exchange)
    first, second = problems(folder)
    assert {first.path, second.path} == {"a", "b"}
    assert "__0_0.distcp has float32[2, 3] of it at [0], and .metadata says float32[8]" in first.cause + second.cause


def shift(metadata):
    infos(metadata, "a")[0].offset += 1


def outside(metadata):
    infos(metadata, "a")[0].relative_path = "../secret.distcp"


def overlap(metadata):
    metadata.state_dict_metadata["a"].size = torch.Size([3, 3])


def beyond(metadata):
    metadata.state_dict_metadata["a"].size = torch.Size([1, 3])


def no_chunks(metadata):
    metadata.state_dict_metadata["a"].chunks = []


def unplaced(metadata):
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != "a"}


def extended(metadata):
    infos(metadata, "a")[0].transform_descriptors = ["stream.zstd"]


def negative(metadata):
    infos(metadata, "a")[0].offset = -1


def odd(metadata):
    metadata.state_dict_metadata["a"].properties.dtype = torch.quint8


@pytest.mark.parametrize(
    ("change", "path", "cause"),
    [
        (shift, "__0_0.distcp", r"it is no zip as torch.save writes it: .*tensor 'a'"),
        (outside, ".metadata", r"'a' is in '../secret.distcp', which is not in the folder"),
        (overlap, "a", r"element \[2, 0\] of \[3, 3\] is in 0 of its 1 chunks"),
        (beyond, "a", r"chunk at \[0, 0\] of \[2, 3\] is not within its shape \[1, 3\]"),
        (no_chunks, "a", "it has no chunks"),
        (unplaced, ".metadata", r"does not say where the chunk of 'a' at \[0, 0\] is"),
        (extended, ".metadata", "'a' was written by way of an extension"),
        (negative, ".metadata", "something else where sizes belong"),
        (odd, ".metadata", "names torch.quint8"),
    ],
)
def test_metadata_that_is_wrong_is_told(folder, change, path, cause):
    rewrite(folder, change)
    (problem,) = problems(folder)
    assert problem.path == path
    assert re.search(cause, problem.cause), problem.cause


def repack(source, target, change, compression):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)


def stored_in(folder, name):
    saved = read_saved(str(folder), name)
    return saved.tensor("matrix", saved.value)


@pytest.mark.parametrize(
    ("name", "change", "compression", "cause"),
    [
        ("compressed", lambda name, data: data, zipfile.ZIP_DEFLATED, "is compressed or encrypted"),
        ("big", lambda name, data: b"big" if name.endswith("byteorder") else data, 0, "lowest byte first"),
        ("short", lambda name, data: data[:-4] if "/data/" in name else data, 0, "has 20 bytes, and 6 elements"),
        ("missing", lambda name, data: None if "/data/" in name else data, 0, "record data/0, which is not there"),
        ("no pickle", lambda name, data: None if "data.pkl" in name else data, 0, "it has 0 records data.pkl"),
    ],
)
def test_zips_that_are_wrong_are_told(tmp_path, name, change, compression, cause):
    torch.save(TENSORS["matrix"], tmp_path / "good.pt")
    repack(tmp_path / "good.pt", tmp_path / "bad.pt", change, compression)
    with pytest.raises(PlanError, match=cause):
        stored_in(tmp_path, "bad.pt")


def test_tensors_that_are_not_contiguous_and_files_that_are_no_zips_are_told(tmp_path):
    torch.save(TENSORS["matrix"].T, tmp_path / "turned.pt")
    saved = read_saved(str(tmp_path), "turned.pt")
    with pytest.raises(PlanError, match=r"turned: in turned.pt its elements do not lie one after another: .*\[1, 3\]"):
        saved.tensor("turned", saved.value)
    torch.save(TENSORS["matrix"], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(PlanError, match=r"old.pt: it is no zip as torch.save writes it: File is not a zip file"):
        read_saved(str(tmp_path), "old.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(PlanError, match=r"pipe.pt: it is no file"):
        read_saved(str(tmp_path), "pipe.pt")


def test_views_of_a_shared_storage_have_their_own_places(tmp_path):
    whole = torch.arange(12.0)
    torch.save([whole[:6].view(2, 3), whole[6:]], tmp_path / "views.pt")
    saved = read_saved(str(tmp_path), "views.pt")
    first, second = (saved.tensor(str(number), one) for number, one in enumerate(saved.value))
    assert second.offset - first.offset == 24
    data = (tmp_path / "views.pt").read_bytes()
    assert torch.equal(torch.frombuffer(bytearray(data[second.offset : second.offset + 24]), dtype=torch.float32), whole[6:])


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_a_bit_flipped_in_what_describes_a_tensor_never_gives_other_bytes(folder, place):
    wanted = read_contents(str(folder)).tensors
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[place] ^= 4
    (folder / "__0_0.distcp").write_bytes(data)
    with suppress(PlanError):
        assert read_contents(str(folder)).tensors == wanted


def test_no_torch_is_needed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    code = "import sys; from shardplan.functional.checkpoints.formats.dcp import read; read(sys.argv[1])"
    code += "; assert 'torch' not in sys.modules"
    run_python(code, tmp_path / "copy")
