"""The audit says what is read of each file, and stays short whatever the number of ranks and files."""

from __future__ import annotations

import re

import pytest

from shardplan.functional import audit, predict
from shardplan.specs import Mesh, ParamSpec, Plan, Shard, SpecTree
from shardplan.specs.source import Loaded
from shardplan.specs.steps import Agree, LoadShard, MakeGroups, Place, Wrap
from shardplan.specs.stored import Folder, Part, StoredFile, StoredTensor
from tests.helpers.num_calls import num_calls


def plan_of(mesh, num_layers, over=(), num_files=1):
    """Layers that lie in files one after another, split by rows and by columns in turns; the files say nothing more."""
    specs, sizes = [], dict.fromkeys((f"model-{number + 1:05}.safetensors" for number in range(num_files)), 8)
    for number in range(num_layers):
        file = list(sizes)[number * num_files // num_layers]
        stored = StoredTensor(file, f"layers.{number}", sizes[file], (512, 256), "bfloat16")
        sizes[file] += 512 * 256 * 2
        stage = number * mesh.pipe // num_layers
        shards = (Shard(number % 2),)
        specs.append(
            ParamSpec(stored.key, stored.shape, "bfloat16", shards=shards, stage=stage, source=Loaded((Part.whole(stored),)))
        )
    steps = [Agree("opening"), MakeGroups(())]
    for stage in range(mesh.pipe):
        paths = tuple(spec.path for spec in specs if spec.stage == stage)
        steps += [LoadShard(stage, paths, "bfloat16", over), Place(stage, paths)]
    files = tuple(StoredFile(*pair) for pair in sizes.items())
    return Plan(mesh, SpecTree(specs), [*steps, Wrap(None), Agree("closing")], folder=Folder("llama", files))


def lines(report):
    text = str(report).splitlines()
    start = next(number for number, line in enumerate(text) if line.startswith("reads"))
    return text[start : text.index("", start)]


def test_each_rank_reads_its_part_of_each_file():
    plan = plan_of(Mesh(data=2, tensor=4), num_layers=8, num_files=4)
    report = audit(plan)
    part = 2 * 512 * 256 * 2 // 4
    for rank in range(8):
        receipt = predict(plan, rank)
        assert receipt.reads == tuple((file.name, part) for file in plan.folder.files)
        assert receipt.read_bytes == receipt.held_bytes
        assert "read of 4 files" in str(receipt)
    first, last = plan.folder.files[0].name, plan.folder.files[-1].name
    assert [re.split(r"\s{2,}", line.strip()) for line in lines(report)] == [
        ["reads", "stage", "ranks", "first", "files", "bytes to each rank", "most of one file"],
        ["0", "8", "0", f"4, {first} .. {last}", "512.0 KiB", "128.0 KiB"],
        ["all ranks together read 4.0 MiB from llama, 4 files of 2.0 MiB"],
    ]


def test_with_dedupe_the_files_are_read_once():
    report = audit(plan_of(Mesh(data=2, tensor=4), num_layers=8, over=("data",)))
    assert {read.coordinate.data for read in report.reads} == {0}
    assert lines(report)[-1] == "        all ranks together read 2.0 MiB from llama, 1 file of 2.0 MiB"


def test_sixteen_thousand_ranks_take_few_lines_and_no_more_computation_than_two_thousand():
    few, many = (plan_of(Mesh(pipe=16, data=data, tensor=8), num_layers=160, num_files=80) for data in (16, 128))
    report = audit(many)
    assert num_calls(audit, many) == num_calls(audit, few)
    assert len(lines(report)) == 1 + 16 + 1
    assert sum(read.num_ranks for read in report.reads) == 5 * 16_384


def test_staging_is_in_the_peak():
    small, large = (plan_of(Mesh(), num_layers=number) for number in (1, 40))
    assert [predict(plan, 0).peak_bytes - predict(plan, 0).held_bytes for plan in (small, large)] == [2**18, 2**20]


@pytest.mark.parametrize("mesh", [Mesh(tensor=2), Mesh(tensor=8)], ids=str)
def test_a_plan_without_files_says_nothing_of_them(mesh):
    tree = SpecTree([ParamSpec("w", (8, 8), "float32")])
    assert "reads" not in str(audit(Plan(mesh, tree, [Agree("opening"), Agree("closing")])))
