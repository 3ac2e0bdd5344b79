"""What is read of a checkpoint is what is kept: its values, its bytes, in as few calls as that takes."""

from __future__ import annotations

import os
import tempfile
from hashlib import sha256
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from attrs import Factory, define, evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.functional.checkpoints import reader
from shardplan.functional.checkpoints.assembly import Assembly, concatenated, narrowed, squeezed, stacked, transposed
from shardplan.functional.checkpoints.byte_ranges import STAGING_BYTES, select, select_all
from shardplan.functional.checkpoints.reader import Files, ReadRequest, read_all
from shardplan.specs import Mesh, ParamSpec, PlanError, Shard
from shardplan.specs.index import index_shape, whole_index
from shardplan.specs.ownership import holders
from shardplan.specs.stored import Folder, Part, StoredFile, StoredTensor
from tests.helpers.strategies import law

DTYPES = ("float32", "bfloat16", "uint8", "complex128", "float8_e4m3fn", "bool", "int64")


@define
class Written:
    """A folder that is being written: its files, and what lies in them."""

    path: Path
    files: dict

    def store(self, values, file="a.bin", gap=0):
        """Put a tensor at the end of a file, after a gap."""
        raw = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        before = self.files.setdefault(file, b"head")
        before += b"\xff" * gap
        self.files[file] = before + raw
        key = f"{file}/{len(before)}"
        return StoredTensor(file, key, len(before), tuple(values.shape), str(values.dtype).removeprefix("torch."))

    def close(self):
        for name, content in self.files.items():
            (self.path / name).write_bytes(content + b"tail")
        return Folder(str(self.path), tuple(StoredFile(name, len(content) + 4) for name, content in self.files.items()))


@pytest.fixture
def written(tmp_path):
    return Written(tmp_path, {})


def values_of(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.itemsize == 1:
        return torch.randint(0, 100, shape, dtype=torch.uint8, generator=generator).view(dtype)
    return (torch.rand(shape, generator=generator) * 1000).to(dtype)


def part_of(whole, index):
    for axis, intervals in enumerate(index):
        entries = [place for start, stop in intervals for place in range(start, stop)]
        whole = whole.index_select(axis, torch.tensor(entries, dtype=torch.int64))
    return whole


@define
class CountedFiles(Files):
    """Counts the calls, and notes which bytes they ask for."""

    calls: int = 0
    places: list = Factory(list)

    def read(self, buffers, offset, stored):
        self.calls += 1
        size = sum(map(len, buffers))
        self.places.append((stored[0].file, offset, size))
        super().read(buffers, offset, stored)


def read(folder, parts, index, dtype):
    out = torch.empty(index_shape(index), dtype=getattr(torch, dtype))
    with CountedFiles(folder) as files:
        read_all([ReadRequest(out, one) for one in select_all(parts, index)], files)
    return out, files


@st.composite
def assemblies(draw, written, dtype):
    """A tensor made of stored ones as a checkpoint's mapping does it, and its values."""

    def one(shape):
        values = values_of(shape, dtype, draw(st.integers(0, 2**20)))
        stored = written.store(values, draw(st.sampled_from(["a.bin", "b.bin"])), draw(st.sampled_from([0, 0, 1, 7])))
        return Assembly.of([Part.whole(stored)]), values

    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    tensor, values = one(shape)
    for _ in range(draw(st.integers(0, 4))):
        num_axes = len(tensor.shape)
        axis = draw(st.integers(0, max(0, num_axes - 1)))
        match draw(st.sampled_from(["concatenate", "stack", "transpose", "narrow", "squeeze"])):
            case "concatenate" if num_axes:
                wide = list(tensor.shape)
                wide[axis] = draw(st.integers(1, 5))
                other, more = one(tuple(wide))
                tensor, values = concatenated([tensor, other], axis), torch.cat([values, more], axis)
            case "stack" if num_axes < 4:
                other, more = one(tensor.shape)
                tensor, values = stacked([tensor, other], axis), torch.stack([values, more], axis)
            case "transpose" if num_axes:
                last = num_axes - 1
                tensor, values = transposed(tensor, axis, last), values.transpose(axis, last)
            case "narrow" if num_axes:
                start = draw(st.integers(0, tensor.shape[axis] - 1))
                stop = draw(st.integers(start + 1, tensor.shape[axis]))
                tensor, values = narrowed(tensor, axis, start, stop), values.narrow(axis, start, stop - start)
            case "squeeze" if num_axes and tensor.shape[axis] == 1:
                tensor, values = squeezed(tensor, axis), values.squeeze(axis)
            case _:
                pass
    return tensor, values


@st.composite
def shards(draw, shape):
    """Ways to split a tensor, over up to two mesh axes."""
    found = []
    for mesh_axis in draw(st.sampled_from([(), ("tensor",), ("data",), ("tensor", "data")])):
        free = [axis for axis in range(len(shape)) if axis not in [shard.axis for shard in found]]
        if not free:
            break
        axis = draw(st.sampled_from(free))
        size, cut = shape[axis], draw(st.integers(1, shape[axis]))
        ways = [
            {"uneven": True, "allow_empty": True},
            {"blocks": (cut, size - cut) if cut < size else (size,), "uneven": True, "allow_empty": True},
            {"granule": size, "replicate": True},
            *([{"pad_to_multiple": 4}] if axis == 0 else []),
            *([{"interleaved": 2}] if size % 2 == 0 else []),
        ]
        found.append(Shard(axis, mesh_axis, **draw(st.sampled_from(ways))))
    return tuple(found)


@settings(law, max_examples=400)
@given(st.data(), st.sampled_from(DTYPES), st.integers(0, 3), st.sampled_from([3, 64, STAGING_BYTES]))
def test_every_rank_reads_what_it_keeps_and_no_other_byte(data, dtype, rank, room):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "staging_bytes", lambda num_bytes: min(num_bytes, max(room, 16)))
        patch.setattr(reader, "_SHORT", data.draw(st.sampled_from([0, 8, 2**14])))
        written = Written(Path(folder), {})
        tensor, values = data.draw(assemblies(written, dtype))
        stored = written.close()
        mesh = Mesh(data=2, tensor=2)
        spec = ParamSpec("w", tuple(tensor.shape), dtype, shards=data.draw(shards(tensor.shape)))
        index = spec.index(mesh.coordinate(rank))
        part, files = read(stored, tensor.parts, index, dtype)
        kept = part_of(values, index)
        assert part.contiguous().view(-1).view(torch.uint8).equal(kept.contiguous().view(-1).view(torch.uint8))
        assert sum(files.num_read.values()) == kept.nbytes
        assert sum(taken.num_bytes for taken in select_all(tensor.parts, index)) == kept.nbytes


@law
@given(st.data())
def test_runs_are_the_bytes_in_the_order_of_the_file(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4)))
    stored = StoredTensor("f", "k", 8, shape, "float32")
    index = []
    for size in shape:
        cuts = data.draw(st.lists(st.integers(0, size), min_size=2, max_size=4, unique=True).map(sorted))
        index.append(tuple((a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)))
    taken = select(Part.whole(stored), tuple(index))
    flat = torch.arange(prod(shape)).reshape(shape)
    wanted = part_of(flat, index).reshape(-1).tolist()
    runs = list(taken.runs())
    assert [b for start, size in runs for b in range(start, start + size, 4)] == [8 + 4 * place for place in wanted]
    assert all(start + size < after for (start, size), (after, _) in pairwise(runs))  # those that meet are one
    assert len(runs) <= taken.num_runs
    assert (taken.begin, taken.end) == (8 + 4 * wanted[0], 12 + 4 * wanted[-1])
    for most in (4, 24, 200):
        windows = list(taken.windows(most))
        assert all(window.num_bytes <= most for window in windows)
        assert [run for window in windows for run in _bytes(window)] == _bytes(taken)


def _bytes(taken):
    return [byte for start, size in taken.runs() for byte in range(start, start + size)]


def test_a_million_rows_are_one_record():
    stored = StoredTensor("f", "k", 0, (2**20, 4096), "bfloat16")
    taken = select(Part.whole(stored), (((0, 2**20),), ((512, 1024),)))
    assert (taken.num_bytes, taken.num_runs, taken.entries) == (2**30, 2**20, (((0, 2**20),), ((512, 1024),)))


def test_neighbouring_tensors_and_rows_are_read_in_one_call(written):
    tensors = [values_of((3, 5), "float32", seed) for seed in range(7)]
    stored = [written.store(values) for values in tensors]
    folder = written.close()
    stack = stacked([Assembly.of([Part.whole(one)]) for one in stored], 0)
    whole, files = read(folder, stack.parts, whole_index((7, 3, 5)), "float32")
    assert torch.equal(whole, torch.stack(tensors))
    assert files.calls == 1
    rows, files = read(folder, stack.parts, (((0, 7),), ((1, 3),), ((0, 5),)), "float32")
    assert torch.equal(rows, torch.stack(tensors)[:, 1:])
    assert files.calls == 7
    assert files.places == sorted(files.places)


def test_large_tensors_are_read_through_little_memory(written, monkeypatch):
    values = values_of((600, 1000), "float32", 0)
    part = Part.whole(written.store(values))
    folder = written.close()
    staged = []
    empty = torch.empty
    monkeypatch.setattr(reader.torch, "empty", lambda *args, **kwargs: staged.append(empty(*args, **kwargs)) or staged[-1])
    out, files = read(folder, (part,), whole_index((600, 1000)), "bfloat16")
    assert torch.equal(out, values.bfloat16())
    assert sum(tensor.nbytes for tensor in staged if tensor is not out) == STAGING_BYTES
    assert files.calls == -(-values.nbytes // (STAGING_BYTES // 4000 * 4000))


@pytest.mark.parametrize("columns", [(0, 3), (100, 700)], ids=["short rows", "long rows"])
def test_rows_are_read_alike_by_calls_and_from_a_map(written, monkeypatch, columns):
    values = values_of((500, 1000), "float32", 0)
    part = Part.whole(written.store(values, gap=1))
    folder = written.close()
    index = (((0, 200), (300, 500)), (columns, (900, 901)))
    mapped, files = read(folder, (part,), index, "float32")
    assert files.calls == 0
    monkeypatch.setattr(reader, "_SHORT", 0)
    called, files = read(folder, (part,), index, "float32")
    assert files.calls > 400
    assert torch.equal(mapped, called)
    assert torch.equal(mapped, part_of(values, index))


@pytest.mark.parametrize("short", [0, 2**14], ids=["by calls", "from a map"])
def test_a_file_that_was_cut_off_is_told_with_the_tensor(written, monkeypatch, short):
    monkeypatch.setattr(reader, "_SHORT", short)
    first, second = (written.store(values_of((64, 64), "float32", seed)) for seed in range(2))
    folder = written.close()
    parts = Assembly.of([Part.whole(first), evolve(Part.whole(second), at=(64, 0))]).parts
    index = (((0, 128),), ((0, 32),))
    os.truncate(written.path / "a.bin", second.offset + 40)
    with pytest.raises(PlanError, match=rf"{first.key}: a.bin cannot be read: it has {second.offset + 40} bytes, and"):
        read(folder, parts, index, "float32")
    late = evolve(folder, files=(StoredFile("a.bin", second.offset + 40),))  # cut off after it was opened
    with pytest.raises(PlanError, match=f"{second.key}: a.bin cannot be read: it is cut off"):
        read(late, parts, index, "float32")


def test_a_file_that_is_not_there_is_told(written):
    part = Part.whole(written.store(torch.zeros(4)))
    folder = written.close()
    (written.path / "a.bin").unlink()
    with pytest.raises(PlanError, match=r"a.bin/4: a.bin cannot be read: No such file or directory"):
        read(folder, (part,), (((0, 4),),), "float32")


def test_a_file_whose_header_changed_is_told(tmp_path):
    header = b'{"w":1}'
    content = len(header).to_bytes(8, "little") + header + bytes(16)
    (tmp_path / "w.safetensors").write_bytes(content)
    folder = Folder(str(tmp_path), (StoredFile("w.safetensors", len(content), sha256(header).hexdigest()),))
    part = Part.whole(StoredTensor("w.safetensors", "w", 15, (4,), "float32"))
    assert read(folder, (part,), (((1, 3),),), "float32")[0].tolist() == [0, 0]
    (tmp_path / "w.safetensors").write_bytes(content.replace(b"1", b"2"))
    with pytest.raises(PlanError, match=r"w: w\.safetensors cannot be read: its header is not the one that was planned"):
        read(folder, (part,), (((1, 3),),), "float32")


def test_no_descriptor_stays_open(written):
    part = Part.whole(written.store(values_of((40, 40), "float32", 0)))
    folder = written.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        read(folder, (part,), (((0, 40),), ((3, 5),)), "float32")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_holders_read_a_tensor_once(written):
    values = values_of((12, 8), "float32", 0)
    part = Part.whole(written.store(values))
    folder = written.close()
    spec = ParamSpec("kv", (12, 8), "float32", shards=(Shard(0, granule=6, replicate=True), Shard(1, "data")))
    found = torch.full((12, 8), -1.0)
    for _, index in holders(spec, Mesh(data=2, tensor=4)):
        piece, _ = read(folder, (part,), index, "float32")
        (rows,), (columns,) = index
        assert (found[slice(*rows), slice(*columns)] == -1).all()
        found[slice(*rows), slice(*columns)] = piece
    assert torch.equal(found, values)


def num_open():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_of_many_files_are_open_at_a_time(tmp_path, monkeypatch):
    whole = torch.arange(200, dtype=torch.int64)
    for number in range(200):
        (tmp_path / f"{number:03d}.bin").write_bytes(whole[number : number + 1].numpy().tobytes())
    folder = Folder(str(tmp_path), tuple(StoredFile(f"{number:03d}.bin", 8) for number in range(200)))
    stored = [StoredTensor(file.name, "w", 0, (1,), "int64") for file in folder.files]
    parts = [evolve(Part.whole(one), at=(number,)) for number, one in enumerate(stored)]
    before, most, opened = num_open(), [], os.open
    monkeypatch.setattr(os, "open", lambda *args: most.append(num_open()) or opened(*args))
    out = torch.empty_like(whole)
    with Files(folder) as files:
        read_all([ReadRequest(out, one) for one in select_all(parts, whole_index((200,)))], files)
    assert torch.equal(out, whole)
    assert len(most) == 200
    assert max(most) <= before + 70
