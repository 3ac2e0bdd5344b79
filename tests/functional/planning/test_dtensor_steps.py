"""Which layouts torch's DTensor can express, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional import DryRun, as_dtensors, audit, execute, plan_build, predict
from shardplan.functional.layout.dtensor import placements
from shardplan.specs import Mesh, ParamSpec, Plan, PlanError, Shard, SpecTree
from shardplan.specs.steps import Agree, AsDTensors, MakeGroups, MakeOptimizer, Wrap
from tests.helpers.models import llama, schedule, split_llama
from tests.helpers.strategies import fitting_shards, law, meshes
from tests.helpers.tensor_parts import by_hand


def plan_of(mesh, *shards, shape=(8, 6)):
    return Plan(mesh, SpecTree([ParamSpec("w", shape, "float32", shards=shards)]), [Wrap(None)])


def refusal(plan):
    with pytest.raises(PlanError) as caught:
        as_dtensors(plan)
    return str(caught.value)


@st.composite
def splits(draw):
    mesh, mesh_axis = evolve(draw(meshes(max_size=4)), pipe=1), draw(st.sampled_from(["data", "tensor"]))
    axis = draw(st.integers(0, 1))
    return mesh, *draw(fitting_shards(mesh, axis, mesh_axis))


@law
@given(splits())
def test_a_split_is_taken_if_it_is_that_of_torch_chunk_and_only_then(split):
    mesh, shard, size = split
    num = mesh.num(shard.mesh_axis)
    chunks = [part.tolist() for part in torch.arange(size).chunk(num)] if size else []
    chunks += [[]] * (num - len(chunks))
    lengths = [shard.length(size, mesh.coordinate(rank)) for rank in mesh.groups(shard.mesh_axis)[0]]
    is_that = [part.tolist() for part in by_hand(shard, size, num)] == chunks and lengths == [*map(len, chunks)]
    plan = plan_of(mesh, shard, shape=(size, 3) if shard.axis == 0 else (3, size))
    if num == 1 or is_that:
        on = placements(as_dtensors(plan).tree["w"], mesh)
        assert on == {"tensor": None} | ({shard.mesh_axis: shard.axis} if num > 1 else {})
    else:
        assert 'layout="local"' in refusal(plan)


REFUSED = {
    "target: 'torch' takes local tensors, which it copies into flat buffers of its own, and DTensors are none": None,
    "blocks  f32[8|16@tensor, 4]: place 0 along 'tensor' has entries 0 to 2, 8 to 12 of axis 0": (
        Shard(0, blocks=(8, 16)),
        24,
    ),
    "interleaved  f32[2x(8|4)@tensor, 4]: place 0 along 'tensor' has entries 0 to 4, 8 to 10 of axis 0": (
        Shard(0, blocks=(8, 4), interleaved=2),
        24,
    ),
    "repeated  f32[24@tensor(repeated), 4]: axis 0 has granules that several ranks along 'tensor' hold": (
        Shard(0, granule=12, replicate=True),
        24,
    ),
    "granules  f32[20@tensor(uneven), 4]: place 0 along 'tensor' has entries 0 to 8 of axis 0, and by DTensor's": (
        Shard(0, granule=4, uneven=True, allow_empty=True),
        20,
    ),
    "padded  f32[21+3@tensor, 4]: axis 0 has 21 entries, padded to 24, and a DTensor has no padding": (
        Shard(0, pad_to_multiple=8),
        21,
    ),
    "experts  f32[4@expert, 4]: axis 0 is split over 'expert', which is a part of 'data'": (
        Shard(0, "expert"),
        4,
    ),
}


def test_what_dtensor_cannot_say_is_told_of_all_tensors_at_once():
    splits = {line.partition(" ")[0]: split for line, split in REFUSED.items() if split}
    specs = [ParamSpec(path, (size, 4), "float32", shards=(shard,)) for path, (shard, size) in splits.items()]
    tree = SpecTree([*specs, ParamSpec("even", (24, 4), "float32", shards=(Shard(0),)), ParamSpec("whole", (3,), "float32")])
    text = refusal(Plan(Mesh(data=2, tensor=4, expert=2), tree, [Wrap("torch")], target="torch"))
    assert text.startswith(f"{len(REFUSED)} problems\n")
    for line in REFUSED:
        assert line in text, line
    assert text.count('execute(plan, layout="local"), or ') == len(REFUSED)


def test_a_layout_that_is_unknown_and_a_pipeline_are_refused():
    plan = plan_build(schedule("plain"))
    with pytest.raises(PlanError, match=r"layout: 'dtensors' is unknown\n +There are local, dtensor"):
        execute(plan, layout="dtensors")
    cause = "layout: mesh pipe=2 data=1 tensor=1: each place along 'pipe' has other tensors"
    assert cause in refusal(plan_of(Mesh(pipe=2)))


def test_the_steps_are_those_of_the_plan_and_two_more():
    plan = plan_build(split_llama(llama(), Mesh(data=2, tensor=2)))
    wanted = as_dtensors(plan)
    at = wanted.steps.index(MakeOptimizer())
    assert wanted.steps[at - 1] == AsDTensors(("data", "tensor"))
    assert [s for s in wanted.steps if not isinstance(s, (MakeGroups, AsDTensors))] == [
        s for s in plan.steps if not isinstance(s, MakeGroups)
    ]
    assert next(s for s in wanted.steps if isinstance(s, MakeGroups)).over == (("data",), ("tensor",))
    assert as_dtensors(wanted) == wanted
    assert as_dtensors(plan_build(schedule("plain"))).steps[:2] == (Agree("opening"), MakeGroups((("data",), ("tensor",))))


def test_a_dry_run_predicts_the_groups_and_the_audit_holds():
    plan = plan_build(split_llama(llama(), Mesh(data=2, tensor=2)))
    receipt = execute(plan, effects=DryRun(rank=3), layout="dtensor").receipt
    assert receipt == predict(as_dtensors(plan), 3)
    assert receipt.num_groups == predict(plan, 3).num_groups + 2
    assert audit(as_dtensors(plan)).ok
