"""Which meshes fit: all are tried, each is what planning by hand gives, and the cheap way never refuses what fits."""

from __future__ import annotations

import sys

import pytest
import torch
from attrs import evolve
from torch import nn

from shardplan.functional import audit, create_schedule, nearest_meshes, plan_build, search
from shardplan.functional.auditing.step_cost import BETWEEN, INSIDE, charged, step_seconds
from shardplan.functional.search import meshes
from shardplan.specs import Mesh, ParamSpec, Plan, PlanError, Shard, SpecTree, as_plain
from tests.helpers.num_calls import num_calls

with torch.device("meta"):
    MODEL = nn.Sequential(*(nn.Linear(*sizes) for _ in range(4) for sizes in ((64, 256), (256, 64))))
INPUTS = {"input": torch.empty(16, 64, device="meta")}


def factory(mesh):
    sch = create_schedule(MODEL, mesh).at["[0246]"].colwise().at["[1357]"].rowwise()
    for place in range(1, mesh.pipe):
        sch = sch.at[str(2 * (4 * place // mesh.pipe) - 1)].cut_pipeline_stage()
    return sch


def config(mesh):
    return {
        "train_batch_size": 4 * mesh.data,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }


def found(num_ranks, device_memory, **arguments):
    given = {"target": "deepspeed", "config": config, "example_inputs": INPUTS, "init_weights": False, **arguments}
    return search(factory, num_ranks=num_ranks, device_memory=device_memory, **given)


@pytest.mark.parametrize("num", [1, 6, 16])
def test_all_meshes_of_a_number_of_ranks_are_tried_once(num):
    by_hand = {
        (p, d, t) for p in range(1, num + 1) for d in range(1, num + 1) for t in range(1, num + 1) if p * d * t == num
    }
    tried = [(mesh.pipe, mesh.data, mesh.tensor) for mesh in meshes(num)]
    assert set(tried) == by_hand
    assert len(tried) == len(by_hand)


def test_each_candidate_is_what_planning_and_auditing_by_hand_gives():
    result = found(4, 2**40, ranks_per_node=2)
    assert len(result.candidates) == 6
    assert all(candidate.fits for candidate in result.candidates)
    costs = [candidate.cost for candidate in result.candidates]
    assert costs == sorted(costs)
    assert result.best == result.candidates[0]
    for candidate in result.candidates[::2]:
        mesh = candidate.mesh
        plan = plan_build(factory(mesh), target="deepspeed", config=config(mesh), example_inputs=INPUTS, init_weights=False)
        report = audit(plan, ranks_per_node=2)
        assert candidate.peak_bytes == report.worst.memory.peak_bytes
        stages = [[row for row in report.training if row.stage == stage] for stage in range(mesh.pipe)]
        busiest = max(stages, key=lambda rows: charged(rows)[0] / INSIDE + charged(rows)[1] / BETWEEN)
        sent = sum(row.inside_bytes for row in busiest), sum(row.between_bytes for row in busiest)
        assert (candidate.inside_bytes, candidate.between_bytes) == sent
        assert candidate.cost > step_seconds(mesh, 4, 0, *charged(busiest)) / (4 * mesh.data), "computation is counted"


def test_a_ring_that_leaves_its_node_anywhere_is_as_slow_as_that_hop():
    (within,) = (c for c in found(8, 2**40, ranks_per_node=8).candidates if c.mesh == Mesh(data=8))
    (across,) = (c for c in found(8, 2**40, ranks_per_node=4).candidates if c.mesh == Mesh(data=8))
    sent = within.inside_bytes
    assert (within.between_bytes, across.between_bytes) == (0, sent // 4)  # 2 of 8 hops
    # all of it at the speed between nodes, not a quarter
    assert 4 * 8 * (across.cost - within.cost) == pytest.approx(sent / BETWEEN - sent / INSIDE, rel=1e-6)


def test_what_is_wrong_on_every_mesh_is_told_once():
    def typo(mesh):
        return factory(mesh).at["layer.*"].colwise()

    with pytest.raises(PlanError, match=r"^1 problem\n  layer\.\*: .*"):
        search(typo, num_ranks=4, device_memory=2**30)
    with pytest.raises(PlanError, match=r"^1 problem\n  target: 'deepsped' is unknown\n .*the closest is deepspeed"):
        found(4, 2**30, target="deepsped")


def test_a_schedule_of_torch_is_for_the_meshes_with_stages():
    config = {"schedule": "1f1b", "num_microbatches": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    result = found(4, 2**40, target="torch", config=config)
    assert {c.mesh.pipe for c in result.candidates if c.fits} == {1, 2, 4}, str(result)
    assert "schedule and num_microbatches are for the meshes with stages" in str(result)
    (whole,) = (c for c in result.candidates if c.mesh == Mesh(data=4))
    plain = {"optimizer": config["optimizer"]}
    plan = plan_build(factory(Mesh(data=4)), target="torch", config=plain, example_inputs=INPUTS, init_weights=False)
    assert whole.peak_bytes == audit(plan).worst.memory.peak_bytes


def test_computation_costs_the_same_on_every_mesh_but_for_the_bubble():
    one, cut = step_seconds(Mesh(data=4), 4, 10**12, 0, 0) / 4, step_seconds(Mesh(pipe=4), 4, 10**12, 0, 0)
    assert cut / one == pytest.approx(7 / 4)


def test_those_too_large_come_last_and_say_how_much_over():
    every = {candidate.mesh: candidate.peak_bytes for candidate in found(4, 2**40).candidates}
    limit = sorted(every.values())[2]
    result = found(4, limit)
    assert {c.mesh for c in result.candidates if c.fits} == {mesh for mesh, peak in every.items() if peak <= limit}
    unplanned = [c for c in result.candidates if c.peak_bytes is not None and c.cost is None]
    assert all(candidate.peak_bytes <= every[candidate.mesh] for candidate in unplanned), "the cheap way is a lower bound"
    assert [c.fits for c in result.candidates] == sorted((c.fits for c in result.candidates), reverse=True)
    text = str(result)
    assert text.startswith("6 meshes of 4 ranks, 3 fit into ")
    assert " over" in text.partition("too large")[2]
    assert "Nobody said how many ranks share a node" in text


def test_nothing_is_planned_that_arithmetic_rules_out(monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(sys.modules["shardplan.functional.search"], "plan_build", never)
    result = found(4, 2**10)
    assert result.best is None
    assert all("not planned" in candidate.cause for candidate in result.candidates)
    assert as_plain(result)["candidates"][0]["fits"] is False


def test_what_is_refused_keeps_its_first_cause_with_layers_folded():
    result = found(3, 2**40)
    refused = [candidate for candidate in result.candidates if candidate.peak_bytes is None]
    assert [candidate.mesh for candidate in refused] == [Mesh(tensor=3)], str(result)
    assert "3 does not divide" in refused[0].cause
    assert refused[0].cause in str(result).partition("refused")[2]
    with pytest.raises(PlanError, match="3 does not divide"):
        plan_build(factory(Mesh(tensor=3)), target="deepspeed", config=config(Mesh(tensor=3)), init_weights=False)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.empty(4, 8, 8, device="meta"))


def test_experts_are_spread_over_every_part_of_data():
    def spread(mesh):
        return create_schedule(nn.ModuleDict({"experts": Experts()}), mesh).at["experts"].expert_parallel()

    result = search(spread, num_ranks=4, device_memory=2**30, init_weights=False)
    tried = {(c.mesh.pipe, c.mesh.data, c.mesh.tensor, c.mesh.expert) for c in result.candidates}
    data = {(1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)}
    assert tried == {(p, d, t, e) for p, d, t in data for e in (1, 2, 4) if d % e == 0}


@pytest.mark.parametrize("number", [0, True, 1.5])
def test_numbers_are_positive(number):
    with pytest.raises(ValueError, match="num_ranks is a positive integer, not "):
        found(number, 2**30)


def test_the_nearest_meshes_fit_by_the_audit_and_the_sizes_divide():
    mesh = Mesh(data=4, tensor=2)
    plan = plan_build(factory(mesh), target="deepspeed", config=config(mesh), init_weights=False)
    limit = audit(plan).worst.memory.training_bytes - 1
    near = nearest_meshes(plan, limit, 8)
    assert near[0] == Mesh(data=2, tensor=4)
    assert near == tuple(sorted(near, key=lambda other: other.num_ranks))
    for other in near:
        again = plan_build(factory(other), target="deepspeed", config=config(other), init_weights=False)
        assert audit(again).worst.memory.training_bytes <= limit
    assert nearest_meshes(plan, 1) == ()


def test_groups_within_a_node_come_first():
    tree = SpecTree([ParamSpec("w", (64, 64), "float32", shards=(Shard(0),))])
    plan = Plan(Mesh(data=4, tensor=4), tree, ())
    assert [mesh.tensor for mesh in nearest_meshes(plan, 2**20, ranks_per_node=4)] == [2, 1, 8]
    assert nearest_meshes(evolve(plan, mesh=Mesh(pipe=2, data=1, tensor=2)), 2**20)[0].pipe == 2


def test_finding_the_nearest_meshes_of_a_plan_for_more_ranks_takes_no_more_computation():
    sizes = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}
    specs = [
        ParamSpec(f"layers.{i}.{name}.weight", (16384, 16384), "bfloat16", shards=(Shard(axis),))
        for i in range(126)
        for name, axis in sizes.items()
    ]
    settings = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}
    few, many = (
        Plan(Mesh(data=data, tensor=8), SpecTree(specs), (), target="deepspeed", config=settings) for data in (256, 2048)
    )
    assert nearest_meshes(many, 80 * 2**30, 8)
    assert num_calls(nearest_meshes, many, 80 * 2**30, 8) < 1.1 * num_calls(nearest_meshes, few, 80 * 2**30, 8)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (5, "sch_factory is a function from a mesh to a schedule, not 5"),
        (lambda _: nn.Linear(2, 2), "for mesh pipe=1 data=2 tensor=1 it returned a Linear"),
        (
            lambda _: create_schedule(nn.Linear(2, 2), Mesh()),
            "for mesh pipe=1 data=2 tensor=1 it returned one for mesh pipe=1 data=1 tensor=1",
        ),
    ],
)
def test_a_factory_that_gives_no_schedule_for_the_mesh_is_told(factory, message):
    with pytest.raises(TypeError, match=message):
        search(factory, num_ranks=2, device_memory=2**20)
