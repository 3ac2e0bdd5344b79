"""Files and folders that are whole, and those that are damaged, exchanged or hostile: the file and the tensor are named."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file

from shardplan.functional.checkpoints.detect import read_contents
from shardplan.functional.checkpoints.formats.manifest import read_manifest
from shardplan.functional.checkpoints.formats.safetensors import DTYPES, read_header
from shardplan.specs.errors import PlanError
from tests.helpers.checkpoint_folders import safetensors_bytes, write_index
from tests.helpers.models import llama

NAME = "model.safetensors"
TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.arange(5, dtype=torch.int64),
    "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "flags": torch.tensor([True, False, True]),
}


def problems(function, *arguments):
    with pytest.raises(PlanError) as caught:
        function(*arguments)
    return caught.value.problems


def refused(folder, content, *arguments):
    (folder / NAME).write_bytes(content)
    return str(PlanError(problems(read_header, str(folder), NAME, *arguments)))


shapes = st.lists(st.integers(0, 5), max_size=3)
names = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(DTYPES.values()))), max_size=6))
def test_of_any_file_the_header_says_what_safetensors_says(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("files")
    tensors = {key: torch.randint(0, 2, shape).to(getattr(torch, dtype)) for key, (shape, dtype) in wanted.items()}
    content = save(tensors, metadata={"format": "pt"})
    (folder / NAME).write_bytes(content)
    file, stored, _ = read_header(str(folder), NAME)
    (length,) = struct.unpack("<Q", content[:8])
    assert (file.name, file.num_bytes, file.digest) == (NAME, len(content), sha256(content[8 : 8 + length]).hexdigest())
    assert stored.keys() == tensors.keys()
    for key, one in stored.items():
        tensor = tensors[key]
        assert (one.file, one.key, one.shape) == (NAME, key, tuple(tensor.shape))
        assert one.dtype == str(tensor.dtype).removeprefix("torch.")
        data = content[one.offset : one.offset + tensor.numel() * one.item_bytes]
        assert data == bytes(tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else b"")


def test_a_file_that_is_cut_off_anywhere_is_refused_with_its_name_and_the_tensor(tmp_path):
    content = save(TENSORS)
    (length,) = struct.unpack("<Q", content[:8])
    for size in range(len(content)):
        said = refused(tmp_path, content[:size])
        assert NAME in said
        assert "is cut off" in said
        assert any(f"  {key}: " in said for key in TENSORS) is (size >= 8 + length)
    assert "bytes are there" in refused(tmp_path, content + b"\0")


def test_any_byte_of_a_header_that_is_changed_changes_the_digest_or_is_refused(tmp_path):
    content = save(TENSORS)
    (length,) = struct.unpack("<Q", content[:8])
    (tmp_path / NAME).write_bytes(content)
    good, *_ = read_header(str(tmp_path), NAME)
    for place in range(8 + length):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (tmp_path / NAME).write_bytes(changed)
            try:
                found, *_ = read_header(str(tmp_path), NAME)
            except PlanError:
                continue
            assert found.digest != good.digest
            load(bytes(changed))  # what is taken here safetensors takes too


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[]", "it is a list, not an object"),
        (b"\xff\xfe", "its header is damaged"),
        (b"{", "its header is damaged"),
        (b'{"a":' * 60_000, "its header is damaged"),
        (b'{"a": {"dtype": "F32"}, "a": {}}', "key 'a' is there twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}', "key 'dtype' is there twice"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', "its header is damaged"),
        ({"a": 3}, "a: in model.safetensors its header entry is damaged"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "its header entry is damaged"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "its header entry is damaged"),
        ({"a": {**ENTRY, "shape": [-2]}}, "its header entry is damaged"),
        ({"a": {**ENTRY, "shape": [2**40, 2**40, 0]}}, "which no file holds"),
        ({"a": {**ENTRY, "shape": [3]}}, "its bytes are 0 to 8, and F32 of shape [3] takes 12"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "its bytes are 8 to 0"),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, "its header entry is damaged"),
        ({"a": {**ENTRY, "dtype": "F8_E8M0"}}, "it has dtype 'F8_E8M0', and those that can be read are F64, "),
        ({"a": ENTRY, "b": ENTRY}, "b: in model.safetensors its bytes begin at 0 of the buffer, and those before it end"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, "b: in model.safetensors its bytes begin at 12"),
        ({"a": {**ENTRY, "data_offsets": [2**60, 2**60 + 8]}}, "a: in model.safetensors its bytes begin at"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_what_the_format_allows_is_refused(header, said, tmp_path):
    content = safetensors_bytes(header, bytes(8))
    assert said in refused(tmp_path, content)
    with pytest.raises((SafetensorError, ValueError, KeyError)):
        load(content)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 99_000_000])
def test_a_length_that_is_not_there_takes_no_memory(length, tmp_path):
    tracemalloc.start()
    said = refused(tmp_path, struct.pack("<Q", length) + b"{}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(length) in said
    assert peak < 1_000_000


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / NAME)
    assert "it is no file" in str(PlanError(problems(read_header, str(tmp_path), NAME)))
    assert "No such file" in str(PlanError(problems(read_header, str(tmp_path), "other.safetensors")))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    llama("cpu").save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def said_of(folder):
    return str(PlanError(problems(read_contents, str(folder))))


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


def keys_of(path):
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_a_whole_folder_is_its_files_and_keys(folder):
    contents = read_contents(str(folder))
    assert [file.name for file in contents.folder.files] == [path.name for path in files_of(folder)]
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {key: parts[0].stored.file for key, parts in contents.tensors.items()} == places


def test_a_file_that_is_missing_is_named_with_what_is_in_it(folder):
    lost = files_of(folder)[1]
    key = next(key for key in read_contents(str(folder)).tensors if key in keys_of(lost))
    keys = keys_of(lost)
    lost.unlink()
    said = said_of(folder)
    assert f"{lost.name}: No such file" in said
    assert any(f"by the index '{one}' and {len(keys) - 1} more should be in it" in said for one in keys), key


def test_a_file_whose_header_is_cut_off_is_named_with_what_is_in_it(folder):
    cut = files_of(folder)[0]
    cut.write_bytes(cut.read_bytes()[:100])
    said = said_of(folder)
    assert f"{cut.name}: it is cut off: its header has" in said
    assert "more should be in it" in said


def test_files_that_are_exchanged_are_refused_with_their_tensors(folder):
    first, second = files_of(folder)[:2]
    key = keys_of(first)[0]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert any(
        problem.path == key and f"the index says that it is in {first.name}, and it is in {second.name}" in problem.cause
        for problem in problems(read_contents, str(folder))
    )


def test_a_file_of_another_save_is_refused_with_its_tensors(folder):
    first = files_of(folder)[0]
    tensors = load_file(first)
    key = next(iter(tensors))
    tensors["more.weight"] = tensors.pop(key)
    save_file(tensors, first)
    assert said_of(folder).startswith(
        f"2 problems\n  {key}: the index says that it is in {first.name}, and none of the files that could be read has it\n"
    )
    assert f"  more.weight: it is in {first.name}, and the index does not know it" in said_of(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    first, second = files_of(folder)[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: tensor}, second)
    assert f"{key}: it is in {second.name} too, and the index says that it is in {first.name}" in said_of(folder)


@pytest.mark.parametrize(
    "index",
    [
        b"{}",
        b"[]",
        b"{",
        b'{"weight_map": {}}',
        b'{"weight_map": ["model.safetensors"]}',
        b'{"weight_map": {"a": "../secret.safetensors"}}',
        b'{"weight_map": {"a": "/etc/secret.safetensors"}}',
        b'{"weight_map": {"a": "pytorch_model.bin"}}',
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        b'{"weight_map": {"a": 3}}',
    ],
)
def test_an_index_that_is_damaged_or_leads_out_of_the_folder_is_refused(index, folder):
    (folder / "model.safetensors.index.json").write_bytes(index)
    (problem,) = problems(read_contents, str(folder))
    assert problem.path == "model.safetensors.index.json"


def test_two_checkpoints_in_one_folder_are_refused(folder):
    save_file({"a": torch.ones(1)}, folder / NAME)
    assert "it holds model.safetensors and model.safetensors.index.json, and nothing says which" in said_of(folder)


def test_other_weights_in_the_folder_are_not_read(folder):
    names = set(read_contents(str(folder)).tensors)
    for name in ("adapter_model", "consolidated", "optimizer"):
        save_file({"a": torch.ones(1)}, folder / f"{name}.safetensors")
    assert set(read_contents(str(folder)).tensors) == names


def test_a_pickle_is_not_read(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save(Hostile(), tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle: reading one can run any code, so that none is read" in said_of(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    assert "it holds no checkpoint that can be read: nothing at all" in said_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "it holds no checkpoint that can be read: config.json" in said_of(tmp_path)
    assert "there is no such folder" in said_of(tmp_path / "meta-llama")
    assert f"it is a file\n      Name the folder: {str(tmp_path)!r}" in said_of(tmp_path / "config.json")


def write_manifest(folder, **changes):
    """A manifest as saving writes it, the sums being made up."""
    paths = files_of(folder)
    manifest = {
        "format": "shardplan checkpoint 1",
        "files": {path.name: path.stat().st_size for path in paths},
        "tensors": {path.name: {key: f"{number:016x}" for number, key in enumerate(keys_of(path))} for path in paths},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return manifest


def test_sums_of_a_manifest_go_to_its_tensors(folder):
    save_file({"exp_avg/a": torch.ones(1)}, folder / "optimizer.safetensors")
    sums = write_manifest(folder, training={"groups": []})["tensors"]
    contents = read_contents(str(folder))
    for (part,) in contents.tensors.values():
        assert part.stored.sum == int(sums[part.stored.file][part.stored.key], 16)
    assert "exp_avg/a" not in contents.tensors
    assert read_manifest(str(folder)).training == {"groups": []}


def test_a_folder_that_is_not_what_its_manifest_says_is_refused(folder):
    first, second, third = files_of(folder)[:3]
    gone, long, renamed = keys_of(first), keys_of(second), load_file(third)
    write_manifest(folder)
    first.unlink()
    second.write_bytes(second.read_bytes() + b"\0")
    key = next(iter(renamed))
    renamed["x" * len(key)] = renamed.pop(key)
    save_file(renamed, third, metadata={"format": "pt"})
    said = said_of(folder)
    assert f"{first.name}: it is not there, and manifest.json has it, with {gone[0]!r}" in said
    assert f"{second.name}: it has " in said
    assert f"when it was saved, with {long[0]!r}" in said
    assert f"{key}: it was in {third.name} when that was saved, and is not" in said
    assert f"{'x' * len(key)}: it is in {third.name}, and was not when that was saved" in said


def test_a_file_that_a_manifest_does_not_know_is_refused(folder):
    first = files_of(folder)[0]
    tensors = load_file(first)
    first.unlink()
    write_manifest(folder)
    save_file(tensors, first)
    assert f"{first.name}: it is here, and manifest.json does not know it" in said_of(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "shardplan checkpoint 9"},
        {"files": {}},
        {"files": {"../a.safetensors": 3}, "tensors": {"../a.safetensors": {}}},
        {"files": {"a.safetensors": True}, "tensors": {"a.safetensors": {}}},
        {"files": {"a.safetensors": 3}, "tensors": {"a.safetensors": {"a": "12"}}},
        {"files": {"a.safetensors": 3}, "tensors": {"a.safetensors": {"a": 12}}},
        {"training": []},
    ],
)
def test_a_manifest_that_is_damaged_is_refused(changes, folder):
    write_manifest(folder, **changes)
    assert [problem.path for problem in problems(read_contents, str(folder))] == ["manifest.json"]


def test_an_index_is_written_as_transformers_writes_it(folder):
    before = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert write_index(folder) == before
