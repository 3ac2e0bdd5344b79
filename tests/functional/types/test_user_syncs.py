"""Functions of the user's own that synchronise: there is no process group while planning, and their word is taken."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from shardplan.functional import create_schedule, plan_build
from shardplan.specs import Mesh, PlanError

X = {"input": torch.empty(2, 3, 4)}


def send(tensor, group):
    out = tensor.clone()
    dist.all_reduce(out, group=group.process_group)
    return out


def broken(tensor, group):
    msg = "no such thing"
    raise ValueError(msg)


def layers(blocks=1):
    sizes = [(4, 8), (8, 4)] * blocks
    return nn.Sequential(*(nn.Linear(*size, bias=False, device="meta") for size in sizes))


def law(sch):
    try:
        equality = plan_build(sch, example_inputs=X).equality
    except PlanError as error:
        return str(error)
    return "; ".join(map(str, equality.unfollowed)) or "holds"


def columns():
    sch = create_schedule(layers(), Mesh(tensor=2)).at["0.weight"].shard(axis=0).at["0"].set(out_features=4)
    return sch.at["1.weight"].shard(axis=1).at["1"]


def test_a_sum_holds_if_it_is_said():
    assert law(columns().sync("forward_post", send, gives="whole")) == "holds"


def test_what_is_said_is_followed():
    assert "each rank is to return it whole" in law(columns().sync("forward_post", send, gives="summand"))


def test_a_function_of_which_nothing_is_said_is_named():
    assert ":send gives: sync(..., gives='whole')" in law(columns().sync("forward_post", send))


def test_a_gather_says_its_axis():
    sch = create_schedule(layers(), Mesh(tensor=2)).at["0.weight"].shard(axis=0).at["0"]
    assert law(sch.sync("forward_post", send, axis=-1, gives="whole")) == "holds"
    assert "nobody says what" in law(sch.sync("forward_post", send, axis=-1))  # the next layer stops, and that is no fault


def test_errors_of_the_function_are_refused():
    assert "ValueError: no such thing" in law(columns().sync("forward_post", broken))


def test_a_gather_before_a_split_layer_needs_the_sum_of_its_gradient():
    sch = (
        create_schedule(layers(blocks=2), Mesh(tensor=2))
        .at["1"]
        .colwise()
        .at["1"]
        .sync("forward_post", send, axis=-1, gives="whole")
    )
    sch = sch.at["2.weight"].shard(axis=0).at["3"].rowwise()
    assert "nothing adds up its gradient" in law(sch)
    assert law(sch.at["2"].sync("backward_post", send, gives="whole")) == "holds"


def test_the_first_stage_of_a_pipeline_is_exported_with_it():
    mesh = Mesh(pipe=2, tensor=2)
    sch = create_schedule(layers(), mesh).at["0.weight"].shard(axis=0).at["1.weight"].shard(axis=1).at["1"]
    sch = sch.sync("forward_post", send, gives="whole").at["0"].cut_pipeline_stage()
    assert law(sch) == "holds"
