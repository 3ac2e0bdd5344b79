"""From mesh to mesh: every rank gets what it holds, each element once, from ranks that have it."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional import plan_build, reshard
from shardplan.specs import Mesh, ParamSpec, Plan, PlanError, Shard, SpecTree
from shardplan.specs.ownership import held_first, holders, local_boxes
from shardplan.specs.plan import misfits
from shardplan.specs.source import Unknown
from tests.helpers.models import llama, split_llama
from tests.helpers.num_calls import num_calls
from tests.helpers.strategies import law, meshes, param_specs


def whole(spec):
    """A tensor whose elements are all different."""
    return torch.arange(spec.num_elements).reshape(spec.orig_shape)


def held(spec, here):
    """What a rank holds of it, by indexing the whole."""
    tensor = whole(spec)
    for axis, intervals in enumerate(spec.index(here)):
        entries = [entry for start, stop in intervals for entry in range(start, stop)]
        tensor = tensor.index_select(axis, torch.tensor(entries, dtype=torch.long))
    return tensor


def box(tensor, where):
    return tensor[tuple(slice(start, stop) for start, stop in where)]


@st.composite
def pairs(draw):
    """A tensor, as two plans of different meshes have it."""
    before, after = draw(meshes()), draw(meshes())
    spec = draw(param_specs(before, path="w"))
    other = evolve(spec, shards=(), stage=draw(st.integers(0, after.pipe - 1)), also_on=())
    shards, mesh_axes = [], {"data", "expert", "tensor"}
    for axis, size in enumerate(spec.orig_shape):
        if not mesh_axes:
            break
        mesh_axis = draw(st.sampled_from(sorted(mesh_axes)))
        num = after.num(mesh_axis)
        ways = [
            Shard(axis, mesh_axis),
            Shard(axis, mesh_axis, replicate=True),
            Shard(axis, mesh_axis, uneven=True, allow_empty=True),
            *([Shard(0, mesh_axis, pad_to_multiple=2 * num)] if axis == 0 else []),
        ]
        fitting = [shard for shard in ways if not shard.misfit(size, num)]
        if fitting and draw(st.booleans()):
            shards.append(draw(st.sampled_from(fitting)))
            mesh_axes -= {"data", "expert"} if mesh_axis != "tensor" else {"tensor"}
    other = evolve(other, shards=tuple(shards))
    return (before, spec), (after, other)


@law
@given(pairs())
def test_every_rank_gets_what_it_holds_and_only_from_ranks_that_have_it(pair):
    (before, spec), (after, other) = pair
    if misfits(after, SpecTree([other])):
        return
    resharding = reshard(*(Plan(mesh, SpecTree([one]), (), folder=None) for mesh, one in _bare(pair)))
    for rank in range(after.num_ranks):
        here = after.coordinate(rank)
        moves = resharding.receives(rank)
        if here.pipe not in other.places(after):
            assert not moves
            continue
        got = torch.full(held(other, here).shape, -1)
        for move in moves:
            sender = before.coordinate(move.source)
            assert sender.pipe in spec.places(before)
            pairs_of_boxes = zip(local_boxes(spec, sender, move.index), local_boxes(other, here, move.index), strict=True)
            for (there, taken), (same, placed) in pairs_of_boxes:
                assert there == same
                assert (box(got, placed) == -1).all()
                got[tuple(slice(*interval) for interval in placed)] = box(held(spec, sender), taken)
        assert torch.equal(got, held(other, here))


def _bare(pair):
    """Without sources, of which those in files would need a folder."""
    return [(mesh, evolve(one, source=Unknown())) for mesh, one in pair]


@law
@given(st.data(), meshes())
def test_holders_have_each_element_once(data, mesh):
    spec = data.draw(param_specs(mesh, path="w"))
    count = torch.zeros(spec.orig_shape, dtype=torch.int)
    for rank, index in holders(spec, mesh):
        here = mesh.coordinate(rank)
        assert held_first(spec, here) == index
        for there, own in local_boxes(spec, here, index):
            assert torch.equal(box(whole(spec), there), box(held(spec, here), own))
            count[tuple(slice(*interval) for interval in there)] += 1
    assert (count == 1).all()
    first = [rank for rank in range(mesh.num_ranks) if held_first(spec, mesh.coordinate(rank)) is not None]
    assert first == [rank for rank, _ in holders(spec, mesh)]


def plan_of(mesh, shape=(8, 4), dtype="float32", path="w"):
    return Plan(mesh, SpecTree([ParamSpec(path, shape, dtype, shards=(Shard(0),))]), ())


def test_what_a_rank_has_stays_and_replicas_send_in_turn():
    resharding = reshard(plan_of(Mesh(data=4)), plan_of(Mesh(tensor=4)))
    assert [(move.source, move.target) for rank in range(4) for move in resharding.receives(rank)] == [
        (n, n) for n in range(4)
    ]
    assert all(resharding.sends(rank) == () for rank in range(4))
    grown = reshard(plan_of(Mesh(data=2)), plan_of(Mesh(tensor=8)))
    assert [move.source for rank in range(2, 8) for move in grown.receives(rank)] == [0, 1, 0, 1, 0, 1]
    assert sorted(move.target for move in grown.sends(1)) == [3, 5, 7]


def test_plans_of_different_tensors_are_refused_with_all_that_differs():
    with pytest.raises(PlanError) as caught:
        reshard(plan_of(Mesh()), plan_of(Mesh(), path="v"))
    assert "v  f32[8@tensor, 4]: the target has it, and the source has not" in str(caught.value)
    assert "w  f32[8@tensor, 4]: the source has it, and the target has not" in str(caught.value)
    with pytest.raises(PlanError, match=r"it is \[8, 4\] in the source, and \[4, 4\] in the target"):
        reshard(plan_of(Mesh()), plan_of(Mesh(), shape=(4, 4)))
    with pytest.raises(PlanError, match=r"it is float32 in the source, and bfloat16 in the target\n.*Go by files"):
        reshard(plan_of(Mesh()), plan_of(Mesh(), dtype="bfloat16"))
    with pytest.raises(TypeError, match=r"reshard takes two plans, not a str"):
        reshard("plan.json", plan_of(Mesh()))


def test_it_is_printed_in_a_few_lines():
    plans = [
        plan_build(split_llama(llama(num_key_value_heads=4), mesh)) for mesh in (Mesh(tensor=2), Mesh(data=2, tensor=4))
    ]
    text = str(reshard(*plans))
    assert text.splitlines()[0].startswith("reshard 23 tensors of ")
    assert "mesh pipe=1 data=1 tensor=2 -> mesh pipe=1 data=2 tensor=4" in text
    assert len(text.splitlines()) <= 12
    assert text.splitlines()[2].split() == ["ranks", "have", "already", "are", "sent"]


def test_tensors_and_ranks_of_a_kind_are_alike():
    plans = [
        plan_build(split_llama(llama(num_key_value_heads=4), mesh)) for mesh in (Mesh(data=2, tensor=2), Mesh(tensor=4))
    ]
    resharding = reshard(*plans)

    def moves(path, rank):
        return [(move.index, move.source == move.target) for move in resharding.of(path, rank)]

    seen = []
    for paths, ranks in resharding.kinds():
        assert all(moves(path, rank) == moves(paths[0], ranks[0]) for path in paths for rank in ranks)
        seen += [(path, rank) for path in paths for rank in ranks]
    assert sorted(seen) == sorted((path, rank) for path in plans[1].tree for rank in range(4))
    assert len({moves("model.layers.0.mlp.up_proj.weight", rank)[0] for rank in range(4)}) == 4


def large(num_layers):
    """A large model over 16 stages, and the same over 256 ranks without stages."""
    layers = [
        ParamSpec(f"layers.{n}.{name}", shape, "bfloat16", shards=(Shard(axis),), stage=n * 16 // num_layers)
        for n in range(num_layers)
        for name, shape, axis in (("up", (53248, 16384), 0), ("down", (16384, 53248), 1), ("q", (16384, 16384), 0))
    ]
    before = Plan(Mesh(pipe=16, tensor=8), SpecTree(layers), ())
    return before, Plan(Mesh(data=4, tensor=64), SpecTree([evolve(spec, stage=0) for spec in layers]), ())


def received(before, after):
    return reshard(before, after).receives(200)


def test_what_a_rank_of_a_large_mesh_receives_takes_computation_in_proportion_to_the_number_of_layers():
    small, twice = large(64), large(128)
    assert len(received(*twice)) == 3 * 128
    assert num_calls(received, *twice) < 2.5 * num_calls(received, *small)
