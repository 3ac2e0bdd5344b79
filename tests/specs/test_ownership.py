"""Each element of a tensor has one first holder, whatever the layout; and its place in what that holder has."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardplan.specs import Mesh, ParamSpec, Shard
from shardplan.specs.index import index_shape
from shardplan.specs.ownership import clip, held_first, holders, local_boxes
from tests.helpers.strategies import meshes, param_specs
from tests.helpers.tensor_parts import picked


@st.composite
def repeated(draw):
    """A tensor of two blocks, whose granules are held by one, two or four of four neighbours; split along another axis."""
    mesh = Mesh(data=2, tensor=4)
    blocks = [2 * draw(st.sampled_from([1, 2, 4])) for _ in range(2)]
    shards = [Shard(1, blocks=blocks, granule=2, replicate=True), *([Shard(0, "data")] if draw(st.booleans()) else [])]
    return mesh, ParamSpec("kv", (4, sum(blocks)), "float32", shards=shards)


@st.composite
def split(draw):
    """A mesh, and a tensor split on it in any way."""
    mesh = draw(meshes())
    return mesh, draw(param_specs(mesh))


placed = repeated() | split()


def coordinates(mesh):
    return [mesh.coordinate(rank) for rank in range(mesh.num_ranks)]


def numbered(spec):
    """A tensor whose elements are all different."""
    return torch.arange(spec.num_elements).view(spec.orig_shape)


@given(placed)
def test_each_element_is_held_first_by_the_lowest_rank_of_its_stage_that_holds_it(case):
    mesh, spec = case
    lowest = torch.full(spec.orig_shape, -1)
    for here in reversed(coordinates(mesh)):
        if here.pipe == spec.places(mesh)[0]:
            lowest[picked(spec.index(here))] = here.rank
    found, times = torch.full(spec.orig_shape, -1), torch.zeros(spec.orig_shape, dtype=torch.int64)
    for rank, index in holders(spec, mesh):
        found[picked(index)] = rank
        times[picked(index)] += 1
    assert (times == 1).all()
    assert torch.equal(found, lowest)


@given(placed)
def test_all_coordinates_together_say_what_the_list_of_holders_says(case):
    mesh, spec = case
    by_one = [(here.rank, index) for here in coordinates(mesh) if (index := held_first(spec, here)) is not None]
    assert tuple(by_one) == holders(spec, mesh)


@given(placed)
def test_boxes_of_what_a_rank_holds_are_where_they_are_said_to_be(case):
    mesh, spec = case
    whole = numbered(spec)
    for rank, index in holders(spec, mesh):
        here = mesh.coordinate(rank)
        local = whole[picked(spec.index(here))]
        found = torch.full(spec.orig_shape, -1)
        for there, own in local_boxes(spec, here, index):
            found[tuple(slice(*span) for span in there)] = local[tuple(slice(*span) for span in own)]
        wanted = torch.full(spec.orig_shape, -1)
        wanted[picked(index)] = whole[picked(index)]
        assert torch.equal(found, wanted)


@given(placed, st.data())
def test_what_lies_in_a_box_is_clipped_to_it(case, data):
    mesh, spec = case
    box = tuple(tuple(sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in spec.orig_shape)
    inside = torch.zeros(spec.orig_shape, dtype=torch.bool)
    inside[tuple(slice(*span) for span in box)] = True
    for _, index in holders(spec, mesh):
        held, left = torch.zeros_like(inside), torch.zeros_like(inside)
        held[picked(index)] = True
        if 0 not in index_shape(part := clip(index, box)):
            left[picked(part)] = True
        assert torch.equal(left, held & inside)
