"""What a training step sends: by rank and mesh axis, inside and between nodes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardplan.functional import audit, create_schedule, plan_build
from shardplan.functional.auditing.traffic import _leaving, _messages_leaving, wire_bytes
from shardplan.specs import Mesh
from tests.helpers.models import schedule
from tests.helpers.strategies import meshes


def crossing(group, ranks_per_node):
    hops = [(a // ranks_per_node, b // ranks_per_node) for a, b in zip(group, [*group[1:], group[0]], strict=True)]
    return sum(a != b for a, b in hops) / len(hops)


@given(meshes(), st.integers(1, 9), st.sampled_from(["data", "tensor", "expert", "expert_data", "pipe"]))
def test_what_leaves_a_node_is_that_of_the_worst_group(mesh, ranks_per_node, mesh_axis):
    for place in range(mesh.pipe):
        groups = {tuple(mesh.coordinate(rank).group(mesh_axis)) for rank in mesh.stage(place)}
        worst = max(crossing(group, ranks_per_node) for group in groups)
        assert _leaving(mesh, place, mesh_axis, ranks_per_node) == worst


@given(meshes(), st.integers(1, 9), st.integers(0, 99), st.integers(0, 99))
def test_of_messages_to_other_places_those_leave_their_node_that_do(mesh, ranks_per_node, ahead, back):
    for place in range(mesh.pipe) if mesh.pipe > 1 else ():
        sent = {(place - 1) % mesh.pipe: back}
        sent |= {(place + 1) % mesh.pipe: ahead}
        left = []
        for rank in mesh.stage(place):
            group = mesh.coordinate(rank).group("pipe")
            left.append(sum(n for to, n in sent.items() if group[to] // ranks_per_node != rank // ranks_per_node))
        assert _messages_leaving(mesh, place, sent, ranks_per_node) == max(left)


@given(st.integers(2, 64), st.integers(0, 2**40))
def test_rings_send_what_a_ring_sends(num_ranks, num_bytes):
    """Step by step: a reduce-scatter and an all-gather, in each of which a rank passes on n - 1 of n parts."""
    part = num_bytes / num_ranks
    one_pass = sum(part for _ in range(num_ranks - 1))
    assert wire_bytes("all_gather", num_ranks, num_bytes) == pytest.approx(one_pass, abs=1, rel=1e-9)
    assert wire_bytes("all_reduce", num_ranks, num_bytes) == pytest.approx(2 * one_pass, abs=1, rel=1e-9)


def test_tensor_parallelism_sends_its_activations_for_each_micro_batch():
    batch, length, width = 3, 5, 64
    inputs = {"input_ids": torch.zeros(batch, length, dtype=torch.long)}
    plan = plan_build(schedule("llama", Mesh(data=2, tensor=4)), example_inputs=inputs)
    rows = {(row.mesh_axis, row.cargo, row.op): row for row in audit(plan, ranks_per_node=4).training}
    hidden = batch * length * width * 4
    reduced = rows["tensor", "activations", "all_reduce"]
    # forward: the embedding, and in each of 2 layers attention and MLP; backward: q, k, v, gate, up of each, and the head
    assert (reduced.num_calls, reduced.num_bytes) == (5 + 2 * 5 + 1, 16 * hidden)
    assert (reduced.between_bytes, reduced.inside_bytes) == (0, 2 * 3 * 16 * hidden // 4)
    gathered = rows["tensor", "activations", "all_gather"]
    assert gathered.num_bytes == batch * length * 128 * 4
    crossed = audit(plan, ranks_per_node=2).training[0]
    assert crossed.between_bytes == crossed.wire_bytes // 2  # 2 of 4 hops


def test_every_boundary_is_crossed_forward_and_back():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    sch = create_schedule(model, Mesh(pipe=3)).at["{0,2}"].cut_pipeline_stage()
    config = {"schedule": "gpipe", "num_microbatches": 6}
    plan = plan_build(sch, target="torch", config=config, example_inputs={"input": torch.ones(2, 8)})
    sent = {row.stage: (row.num_calls, row.num_bytes) for row in audit(plan).training}
    wide, narrow = 2 * 16 * 4, 2 * 8 * 4
    assert sent == {0: (6, 6 * wide), 1: (12, 6 * (wide + narrow)), 2: (6, 6 * narrow)}


def chain(pipe, *, config, num):
    """A plan of ``num`` stages that each give 2 x 16 floats and a gradient back, over ``pipe`` places."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(num)))
    sch = create_schedule(model, Mesh(pipe=pipe)).at[f"{{{','.join(map(str, range(num - 1)))}}}"].cut_pipeline_stage()
    return plan_build(sch, target="torch", config=config, example_inputs={"input": torch.ones(2, 16)})


def test_only_what_goes_to_another_node_is_counted_between_nodes():
    plan = chain(4, config={"schedule": "1f1b", "num_microbatches": 4}, num=4)
    size = 4 * 2 * 16 * 4  # of all micro-batches, one way
    sent = {row.stage: (row.inside_bytes, row.between_bytes) for row in audit(plan, ranks_per_node=2).training}
    # two nodes of two places: one boundary of three lies between them; the first stage's input takes no gradient back
    assert sent == {0: (size, 0), 1: (size, size), 2: (size, size), 3: (size, 0)}


def test_the_last_place_sends_to_the_first_where_each_has_several_stages():
    plan = chain(4, config={"schedule": "interleaved_1f1b", "num_microbatches": 4}, num=8)
    size = 4 * 2 * 16 * 4
    sent = {row.stage: (row.inside_bytes, row.between_bytes) for row in audit(plan, ranks_per_node=2).training}
    # place 0 has stages 0 and 4: two go on to place 1, and one gradient back to place 3, in the other node
    assert sent == {0: (2 * size, size), 1: (2 * size, 2 * size), 2: (2 * size, 2 * size), 3: (2 * size, size)}


def test_one_rank_sends_nothing():
    plan = plan_build(schedule("plain"), example_inputs={"ids": torch.zeros(2, 4, dtype=torch.long)})
    assert audit(plan).training == ()
