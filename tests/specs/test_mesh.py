"""Ranks, coordinates and groups are arithmetic, and DeepSpeed numbers its ranks alike."""

from __future__ import annotations

import tracemalloc
from itertools import product

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from shardplan.specs import MESH_AXES, Coordinate, Mesh
from tests.helpers.strategies import FINE_AXES, NEIGHBOURS, coordinates, law, meshes


@law
@given(meshes(5))
def test_the_last_mesh_axis_varies_fastest(mesh):
    listed = product(range(mesh.pipe), range(mesh.data), range(mesh.tensor))
    assert [mesh.rank(Coordinate(*places, mesh=mesh)) for places in listed] == list(range(mesh.num_ranks))


@law
@given(coordinates())
def test_rank_is_a_formula_of_the_coordinate(here):
    mesh = here.mesh
    assert here.rank == (here.pipe * mesh.data + here.data) * mesh.tensor + here.tensor


@law
@given(meshes(5))
def test_rank_and_coordinate_are_inverse(mesh):
    everywhere = [mesh.coordinate(rank) for rank in range(mesh.num_ranks)]
    assert [mesh.rank(here) for here in everywhere] == list(range(mesh.num_ranks))
    assert len(set(everywhere)) == mesh.num_ranks


@law
@given(meshes(), st.sampled_from(NEIGHBOURS))
def test_groups_partition_the_ranks(mesh, mesh_axes):
    groups = mesh.groups(*mesh_axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.num_ranks))
    assert {len(group) for group in groups} == {mesh.num(*mesh_axes)}
    assert len(list(groups)) == len(groups)


def fine(mesh_axes):
    return [m for axis in mesh_axes for m in (("expert_data", "expert") if axis == "data" else (axis,))]


@law
@given(meshes(), st.sampled_from(NEIGHBOURS))
def test_a_group_is_the_ranks_that_agree_elsewhere(mesh, mesh_axes):
    listed = {}
    for rank in range(mesh.num_ranks):
        here = mesh.coordinate(rank)
        listed.setdefault(tuple(here.index(m) for m in FINE_AXES if m not in fine(mesh_axes)), []).append(rank)
    assert list(map(list, mesh.groups(*mesh_axes))) == sorted(listed.values())


@law
@given(coordinates(), st.sampled_from(NEIGHBOURS))
def test_a_coordinate_is_in_its_own_group(here, mesh_axes):
    group = here.group(*mesh_axes)
    assert here.rank in group
    assert group in here.mesh.groups(*mesh_axes)
    assert here.is_first(*mesh_axes) == (group[0] == here.rank)


@law
@given(meshes(), st.permutations(("data", "tensor")))
def test_the_order_in_which_mesh_axes_are_named_means_nothing(mesh, mesh_axes):
    assert mesh.groups(*mesh_axes) == mesh.groups("data", "tensor")


@law
@given(meshes())
def test_data_is_its_two_factors(mesh):
    assert mesh.num("data") == mesh.num("expert_data", "expert")
    assert mesh.groups("data") == mesh.groups("expert_data", "expert") == mesh.groups("expert", "expert_data")
    assert mesh.num_ranks == mesh.num(*FINE_AXES)
    for here in map(mesh.coordinate, range(mesh.num_ranks)):
        assert here.data == here.index("expert_data") * mesh.expert + here.index("expert")
        assert (here.index("expert_data"), here.index("expert")) == divmod(here.index("data"), mesh.expert)
        assert here.is_first("data") == here.is_first("expert", "expert_data")
        # those that share the experts of a layer are neighbours along data
        assert [mesh.coordinate(rank).data - here.index("expert_data") * mesh.expert for rank in here.group("expert")] == [
            *range(mesh.expert)
        ]
        # those that hold the same experts are as many places along data apart as there are in between
        assert [mesh.coordinate(rank).data for rank in here.group("expert_data")] == [
            *range(here.index("expert"), mesh.data, mesh.expert)
        ]


@law
@given(meshes(4))
def test_without_experts_a_mesh_is_what_it_was(mesh):
    bare = evolve(mesh, expert=1)
    for axes in NEIGHBOURS:
        if not {"expert", "expert_data"} & set(axes):
            assert mesh.groups(*axes) == bare.groups(*axes)
    assert [mesh.rank(evolve(bare.coordinate(rank), mesh=mesh)) for rank in range(bare.num_ranks)] == [
        *range(mesh.num_ranks)
    ]
    assert bare.groups("expert_data") == bare.groups("data")
    assert all(len(group) == 1 for group in bare.groups("expert"))
    assert str(mesh).removeprefix(str(bare)) == (f" expert={mesh.expert}" if mesh.expert > 1 else "")


@law
@given(meshes(4), st.sampled_from(["pipe", "data", "expert_data", "expert", "tensor"]), st.data())
def test_neighbours_are_the_parts_of_groups_in_order(mesh, mesh_axis, data):
    num = mesh.num(mesh_axis)
    few = data.draw(st.sampled_from([n for n in range(1, num + 1) if num % n == 0]))
    found = list(map(list, mesh.neighbours(mesh_axis, few)))
    parts = [list(group)[at : at + few] for group in mesh.groups(mesh_axis) for at in range(0, num, few)]
    assert sorted(found) == sorted(parts)
    assert len(mesh.neighbours(mesh_axis, few)) == mesh.num_ranks // few
    for rank in range(mesh.num_ranks):
        assert rank in mesh.neighbours(mesh_axis, few).of(rank)


@law
@given(meshes())
def test_a_stage_is_the_ranks_with_its_place_along_pipe(mesh):
    for stage in range(mesh.pipe):
        assert list(mesh.stage(stage)) == [r for r in range(mesh.num_ranks) if mesh.coordinate(r).pipe == stage]


@law
@given(meshes(), st.sampled_from(NEIGHBOURS))
def test_groups_are_indexed_like_a_tuple(mesh, mesh_axes):
    groups = mesh.groups(*mesh_axes)
    assert groups[1:] == list(groups)[1:]
    assert groups[-1] == list(groups)[-1]
    with pytest.raises(IndexError, match=f"group {len(groups)} of {len(groups)}"):
        groups[len(groups)]


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(pipe=2, data=3, tensor=4), Mesh(pipe=4, data=2), Mesh(data=3, tensor=2)])
def test_deepspeed_numbers_its_ranks_alike(mesh):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=mesh.pipe, num_mp=mesh.tensor, num_dp=mesh.data)
    assert topology.world_size() == mesh.num_ranks
    for rank in range(mesh.num_ranks):
        here = mesh.coordinate(rank)
        assert topology.get_coord(rank) == (here.pipe, here.data, here.tensor)
    for mesh_axis, theirs in (("pipe", "pipe"), ("data", "data"), ("tensor", "model")):
        assert list(map(list, mesh.groups(mesh_axis))) == topology.get_axis_comm_lists(theirs)


def test_a_mesh_of_16384_ranks_lists_nothing():
    tracemalloc.start()
    try:
        mesh = Mesh(pipe=4, data=256, tensor=16)
        here = mesh.coordinate(13_579)
        found = [(mesh.groups(*axes), here.group(*axes)) for axes in NEIGHBOURS]
        stage = mesh.stage(3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16_384  # less than a byte a rank
    assert all(isinstance(group, range) for _, group in found)
    assert [len(groups) * len(group) for groups, group in found] == [16_384] * len(NEIGHBOURS)
    assert stage == range(12_288, 16_384)
    assert here.rank == 13_579


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Mesh(pipe=0), ValueError, "'pipe' must be >= 1: 0"),
        (lambda: Mesh(pipe=True), TypeError, "pipe is an integer, not True"),
        (
            lambda: Mesh(tensor=2).rank(Mesh(data=4).coordinate(3)),
            ValueError,
            "stands on mesh pipe=1 data=4 tensor=1, not on",
        ),
        (lambda: Mesh(pipe=2).stage(7), IndexError, "stage 7 is not on mesh pipe=2 data=1 tensor=1"),
        (lambda: Mesh(data=1.5), TypeError, "data is an integer, not 1.5"),
        (
            lambda: Mesh(tensor=2).coordinate(2),
            IndexError,
            "rank 2 is not on mesh pipe=1 data=1 tensor=2, whose ranks are 0 to 1",
        ),
        (lambda: Mesh(tensor=2).coordinate(-1), IndexError, "rank -1 is not on mesh pipe=1 data=1 tensor=2"),
        (lambda: Coordinate(0, 2, 0, Mesh(data=2)), ValueError, "coordinate data=2 is not on mesh pipe=1 data=2 tensor=1"),
        (
            lambda: Mesh().num("model"),
            ValueError,
            "mesh axis 'model' is unknown; there are pipe, data, expert_data, expert, tensor",
        ),
        (lambda: Mesh().groups("model"), ValueError, "mesh axis 'model' is unknown; there are pipe, data, "),
        (
            lambda: Mesh().groups("pipe", "tensor"),
            ValueError,
            r"\('pipe', 'tensor'\) are not neighbours in the order pipe, data",
        ),
        (
            lambda: Mesh(data=6, expert=4),
            ValueError,
            "expert=4 is carved out of data=6, and does not divide it",
        ),
        (lambda: Mesh(data=2, expert=0), ValueError, "'expert' must be >= 1: 0"),
        (lambda: Mesh(data=2, expert=True), TypeError, "expert is an integer, not True"),
        (
            lambda: Mesh(data=4, expert=2).groups("pipe", "expert"),
            ValueError,
            r"\('pipe', 'expert'\) are not neighbours in the order pipe, data, tensor",
        ),
        (lambda: Mesh().groups(), ValueError, r"mesh axes \(\) are not neighbours"),
    ],
)
def test_what_is_not_on_a_mesh_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@law
@given(meshes(), st.sampled_from(NEIGHBOURS))
def test_a_rank_outside_belongs_to_no_group(mesh, mesh_axes):
    for rank in (-1, mesh.num_ranks):
        with pytest.raises(IndexError, match="group"):
            mesh.groups(*mesh_axes).of(rank)


def test_a_mesh_axis_is_asked_by_its_name():
    here = Mesh(pipe=2, data=2, tensor=2).coordinate(3)
    assert [here.index(mesh_axis) for mesh_axis in MESH_AXES] == [0, 1, 1]
    for name in ("model", "mesh", "rank"):
        with pytest.raises(ValueError, match=f"mesh axis '{name}' is unknown; there are pipe, data, expert_data, expert"):
            here.index(name)
