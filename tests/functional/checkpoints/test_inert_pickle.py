"""Hostile pickles: whatever they would do is not done, wherever they lie, and the file is named."""

from __future__ import annotations

import ast
import io
import os
import pickle
import pickletools
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

import shardplan.functional
import shardplan.specs
from shardplan.functional.checkpoints.detect import read_contents
from shardplan.functional.checkpoints.formats.inert_pickle import Entries, Record, read_pickle
from shardplan.functional.checkpoints.formats.torch_save import read_saved
from shardplan.specs.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

MOST = 2**24


class Runs:
    """What ``pickle.dumps`` makes a REDUCE of."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Builds:
    """A harmless record whose state would run something."""

    def __init__(self, command):
        self.state = Runs(command)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile(command):
    """Pickles that run a command when they are unpickled, by the way in which they do it."""
    run = text(command)
    shell = b"cposix\nsystem\n"
    ways = {
        "REDUCE": pickle.dumps(Runs(command)),
        "REDUCE, protocol 0": pickle.dumps(Runs(command), protocol=0),
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + shell + b"sb" + run + b"b.",
        "BUILD of a state": b"\x80\x02ccollections\nOrderedDict\n)R" + shell + run + b"\x85Rb.",
        "INST": b"(" + run + b"iposix\nsystem\n.",
        "OBJ": b"(" + shell + run + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + run + b"N" * 0 + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n(l" + run + b"a\x85}" + text("shell") + b"\x88s\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + run + b"\x85R.",
        "eval": b"\x80\x02c__builtin__\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R.",
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0dhub.os.system\x93" + run + b"\x85R.",
        "memo": shell + b"q\x00" + b"0h\x00" + run + b"\x85R.",
        "memo of a harmless name": b"ccollections\nOrderedDict\nq\x000" + shell + b"q\x000h\x00" + run + b"\x85R.",
        "a persistent id": b"\x80\x02" + shell + run + b"\x85RQ.",
        "a textual persistent id": b"P" + command.encode() + b"\n.",
        "an extension": b"\x80\x02\x82\x01" + run + b"\x85R.",
        "after what is harmless": b"\x80\x02}" + text("param") + pickle.dumps(Runs(command), protocol=2)[2:-1] + b"s.",
        "within torch's own call": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + shell + run + b"\x85R\x85R.",
        "a buffer": b"\x80\x05\x97.",
    }
    for data in ways.values():
        assert list(pickletools.genops(data)), "it is a pickle, and no noise"
    return ways


WAYS = list(hostile("true"))
RUN_BY_PICKLE = {"REDUCE", "REDUCE, protocol 0", "INST", "OBJ", "STACK_GLOBAL", "eval", "memo", "memo of a harmless name"}


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "it ran"


@pytest.mark.parametrize("way", sorted(RUN_BY_PICKLE))
def test_the_hostile_pickles_are_real(way, marker):
    pickle.loads(hostile(f"touch '{marker}'")[way])
    assert marker.exists()


def dcp_folder(root):
    dcp.save({"model": {"weight": torch.arange(6.0).view(2, 3)}}, checkpoint_id=root, no_dist=True)
    return root


def zipped(pickled):
    """What ``torch.save`` would write if this was what it pickles to."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("data/0", bytes(24)), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    return made.getvalue()


def in_metadata(root, pickled):
    (dcp_folder(root) / ".metadata").write_bytes(pickled)
    return ".metadata"


def in_distcp(root, pickled):
    """Put in the place of the one tensor of a checkpoint, whose length is told as it is now."""
    (file,) = dcp_folder(root).glob("*.distcp")
    data = zipped(pickled)
    metadata = dcp.FileSystemReader(root).read_metadata()
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(data)
    (root / ".metadata").write_bytes(pickle.dumps(metadata))
    file.write_bytes(data)
    return file.name


def in_universal(root, pickled):
    file = root / "zero" / "model.weight" / "fp32.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(zipped(pickled))
    return "zero/model.weight/fp32.pt"


@pytest.mark.parametrize("put", [in_metadata, in_distcp, in_universal])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_runs_and_the_file_is_named(way, put, marker, tmp_path):
    name = put(tmp_path / "folder", hostile(f"touch '{marker}'")[way])
    with pytest.raises(PlanError) as caught:
        read_contents(str(tmp_path / "folder"))
    assert not marker.exists()
    (problem,) = caught.value.problems
    assert problem.path == name
    assert "it is a pickle" in problem.cause
    assert "could run code" in problem.cause


def test_what_is_named_is_told(tmp_path):
    data = hostile("true")
    for way, named in {
        "REDUCE": "posix.system",
        "NEWOBJ": "subprocess.Popen",
        "a dotted name": "torch.hub.os.system",
    }.items():
        with pytest.raises(PlanError, match=rf"weights.pt: it is a pickle that names {named}, which no checkpoint needs"):
            read_pickle(data[way], "weights.pt", {"torch.Size"}, MOST)
    with pytest.raises(PlanError, match="opcode INST, which no checkpoint needs"):
        read_pickle(data["INST"], "weights.pt", {"torch.Size"}, MOST)


def test_pickles_beside_safetensors_are_never_opened(tmp_path, marker):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(hostile(f"touch '{marker}'")["REDUCE"])
        (tmp_path / name).chmod(0)
    assert set(read_contents(str(tmp_path)).tensors) == {"weight"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PlanError, match="a pickle: reading one can run any code, so that none is read"):
        read_contents(str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "case",
    {
        "nothing": (b"", "pickle exhausted before seeing STOP"),
        "cut off": (pickle.dumps({"a": 1})[:-3], "not enough data in stream"),
        "cut off within a text": (b"X\xff\x00\x00\x00abc", "expected 255 bytes in a unicodestring4"),
        "an empty stack": (b".", "takes more from its stack"),
        "a mark that is not there": (b"t.", "takes more from its stack"),
        "a mark as a value": (b"(.", "takes more from its stack"),
        "too much left": (b"NN.", "1 values are left over"),
        "a memo that was never made": (b"h\x07.", "entry 7 of its memo"),
        "a memo of nothing": (b"q\x00.", "takes more from its stack"),
        "a call of a number": (b"\x80\x02K\x01)R.", "a int where a Global belongs"),
        "arguments that are none": (b"\x80\x02ctorch\nSize\nK\x01R.", "a int where a tuple belongs"),
        "a state of a list": (b"\x80\x02](b.", "takes more from its stack"),
        "half an entry": (b"\x80\x02}(Nu.", "argument"),
        "no opcode": (b"\xff.", "opcode b'\\\\xff' unknown"),
        "a name without a module": (b"\x80\x04NN\x93.", "a NoneType where a str belongs"),
        "a text that is none": (b"X\x01\x00\x00\x00\xff.", "codec can't decode"),
    }.items(),
    ids=lambda case: case[0],
)
def test_damage_is_told(case):
    data, cause = case[1]
    with pytest.raises(PlanError, match=f"weights.pt: its pickle is damaged: .*{cause}"):
        read_pickle(data, "weights.pt", {"torch.Size"}, MOST)


def test_what_is_too_large_or_nested_without_end_does_no_harm():
    with pytest.raises(PlanError, match="its pickle has 101 bytes, and 100 are the most that is read"):
        read_pickle(b"N" * 101, "weights.pt", (), 100)
    deep = read_pickle(b"\x80\x02N" + b"\x85" * 300_000 + b".", "weights.pt", (), MOST)
    assert len(deep) == 1
    del deep
    doubling = b"\x80\x02N" + b"".join(
        b"r" + struct.pack("<I", n) + b"j" + struct.pack("<I", n) + b"\x86" for n in range(1000)
    )
    assert len(read_pickle(doubling + b".", "weights.pt", (), MOST)) == 2
    as_key = b"\x80\x02}" + b"N" + b"\x85" * 100_000 + b"Ns."
    assert isinstance(read_pickle(as_key, "weights.pt", (), MOST), Entries)
    itself = read_pickle(b"\x80\x02]q\x00h\x00a.", "weights.pt", (), MOST)
    assert itself[0] is itself


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda some: st.lists(some) | st.tuples(some, some) | st.dictionaries(st.text(), some),
)


def seen(value):
    if isinstance(value, Entries):
        return {key: seen(one) for key, one in value.pairs}
    if isinstance(value, list | tuple):
        return type(value)(map(seen, value))
    return value


@given(plain, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    assert seen(read_pickle(pickle.dumps(value, protocol=protocol), "f", (), MOST)) == value


@settings(max_examples=300)
@given(st.data())
def test_bytes_changed_at_random_give_a_value_or_a_plan_error(data):
    whole = bytearray(pickle.dumps({"a": (1, 2.5, "x"), "b": [None, True, {"c": ()}]}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(PlanError):
        read_pickle(bytes(whole), "f", (), MOST)


def test_records_keep_what_they_would_be_called_with():
    made = read_pickle(pickle.dumps(torch.Size([2, 3])), "f", {"torch.Size"}, MOST)
    assert isinstance(made, Record)
    assert (made.name, made.args, made.state) == ("torch.Size", ((2, 3),), None)


def test_a_zip_whose_pickle_is_too_large_is_not_read(tmp_path):
    (tmp_path / "big.pt").write_bytes(zipped(b"N" * (2**20 + 1)))
    with pytest.raises(PlanError, match=r"big.pt: .*record archive/data.pkl has|data.pkl has 1048577 bytes"):
        read_saved(str(tmp_path), "big.pt")


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            yield from (
                f"import {name}" for name in (*names, module) if name.split(".")[0] in {"pickle", "dill", "cloudpickle"}
            )
            yield from (f"import {name}" for name in names if name in {"shelve", "marshal", "joblib", "_pickle"})
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}:
                yield called
            if called.endswith("np.load") or any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield called


def test_no_module_unpickles():
    found = {
        f"{path.name}: {call}"
        for package in (shardplan.functional, shardplan.specs)
        for path in Path(package.__path__[0]).rglob("*.py")
        for call in calls(ast.parse(path.read_text()))
    }
    assert not found


def test_the_search_for_unpickling_finds_it():
    bad = "import pickle\nfrom pickle import loads\ntorch.load(f)\nnp.load(f)\nnumpy.fromfile(f, allow_pickle=True)\n"
    assert len(list(calls(ast.parse(bad)))) == 5
