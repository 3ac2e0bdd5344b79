"""However tensors are split, real processes get the bits of one process, and do what was predicted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import audit, create_schedule, execute, plan_build, predict
from shardplan.specs import Mesh
from tests.helpers.ranks import results, run_ranks
from tests.helpers.training import local_tensors, put_together

OVER_TENSOR = {
    "even": ((12, 5), {"axis": 0}),
    "blocks": ((32, 6), {"axis": 0, "blocks": (16, 8, 8), "granule": 2}),
    "inner_blocks": ((5, 24), {"axis": 1, "blocks": (16, 8)}),
    "middle_blocks": ((3, 16, 5), {"axis": 1, "blocks": (8, 8)}),
    "repeated": ((24, 6), {"axis": 0, "blocks": (16, 4, 4), "granule": 4, "replicate": True}),
    "some_repeated": ((20, 6), {"axis": 0, "blocks": (8, 4, 8), "granule": 2, "replicate": True}),
    "interleaved": ((24, 5), {"axis": 0, "interleaved": 8}),
    "few_groups": ((16, 5), {"axis": 0, "interleaved": 2, "blocks": (4, 4), "granule": 2}),
    "uneven": ((7, 5), {"axis": 0, "uneven": True}),
    "inner_uneven": ((5, 7), {"axis": 1, "uneven": True}),
    "uneven_heads": ((21, 5), {"axis": 0, "uneven": True, "granule": 3}),
    "some_empty": ((5, 3), {"axis": 0, "uneven": True, "allow_empty": True}),
    "padded": ((13, 3), {"axis": 0, "pad_to_multiple": 8}),
    "all_padding": ((5, 3), {"axis": 0, "pad_to_multiple": 16}),
}
IN_EXPERTS = {
    "gate_up": ((4, 24, 5), {"axis": 1, "blocks": (12, 12)}),
    "down": ((4, 5, 12), {"axis": 2}),
    "odd": ((4, 7, 3), {"axis": 1, "uneven": True}),
    "repeated": ((4, 10, 3), {"axis": 1, "blocks": (8, 2), "granule": 2, "replicate": True}),
}
SOURCES = ("drawn", "opaque", "kept")


class Tensors(nn.Module):
    """A tensor of each layout and source: an init program, code that nothing stands for, values that are there already."""

    def __init__(self, layouts):
        super().__init__()
        for name, (shape, _) in layouts.items():
            for source in ("drawn", "opaque"):
                self.register_parameter(f"{name}_{source}", nn.Parameter(torch.empty(shape, device="meta")))
            values = torch.arange(float(torch.Size(shape).numel())).view(shape)
            self.register_parameter(f"{name}_kept", nn.Parameter(values))
        self.num_experts = 4

    def reset_parameters(self):
        for name, parameter in self.named_parameters():
            if name.endswith("drawn"):
                nn.init.kaiming_uniform_(parameter, a=5**0.5)  # by the fan-in of the whole tensor


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = Tensors(OVER_TENSOR)
        self.experts = Tensors(IN_EXPERTS)
        self.up, self.down = nn.Linear(6, 7, device="meta"), nn.Linear(7, 6, device="meta")
        self.embed = nn.Embedding(13, 6, padding_idx=12, device="meta", dtype=torch.bfloat16)


def schedule(mesh, model=None):
    sch = create_schedule(model or Model(), mesh)
    for module, layouts in (("plain", OVER_TENSOR), ("experts", IN_EXPERTS)):
        for name, (_, split) in layouts.items():
            for source in SOURCES:
                sch = sch.at[module].shard(f"{name}_{source}", **split)
    sch = sch.at["plain.even_*"].shard(axis=1, mesh_axis="data", uneven=True, allow_empty=True)
    for mesh_axis in ("data", "tensor"):
        sch = sch.at[""].sync("forward_post", "all_gather", axis=-1, mesh_axis=mesh_axis)
    sch = sch.at["experts"].expert_parallel()
    sch = sch.at["{plain,experts}.*_opaque"].init(nn.init.orthogonal_)
    sch = sch.at["up"].colwise(uneven=True).at["down"].rowwise(uneven=True)
    return sch.at["embed"].vocab_parallel(pad_to_multiple=8)


def fill(rank, jobs):
    made = []
    for mesh, strategy in jobs:
        plan = plan_build(schedule(mesh), strategy=strategy, seed=5)
        built = execute(plan, device="cpu", progress=False)
        held = sum(
            {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in built.module.parameters()}.values()
        )
        made.append((local_tensors(built.module, plan.tree), built.receipt, held))
        for attribute, tensor in (("out_features", built.module.up.weight), ("num_embeddings", built.module.embed.weight)):
            assert getattr(built.module.up if "out" in attribute else built.module.embed, attribute) == tensor.shape[0]
        assert built.module.down.in_features == built.module.down.weight.shape[1]
    return made


@pytest.fixture(scope="module")
def alone():
    """What one process makes of it."""
    module = execute(plan_build(schedule(Mesh()), seed=5), device="cpu", progress=False).module
    return {path: tensor.detach() for path, tensor in module.named_parameters()}


STRATEGIES = ("local", "scatter", "broadcast")
MESHES = {
    2: (Mesh(tensor=2),),
    4: (Mesh(tensor=4), Mesh(data=2, tensor=2, expert=2), Mesh(data=4, expert=2)),
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_values_are_those_of_one_process_and_receipts_the_predicted(num_ranks, alone):
    jobs = [(mesh, strategy) for mesh in MESHES[num_ranks] for strategy in STRATEGIES]
    ranks = results(run_ranks(fill, num_ranks, jobs))
    for number, (mesh, strategy) in enumerate(jobs):
        plan = plan_build(schedule(mesh), strategy=strategy, seed=5)
        found = [one[number] for one in ranks]
        weights = put_together(plan, [local for local, *_ in found])
        assert weights.keys() == alone.keys()
        for path, tensor in alone.items():
            assert torch.equal(weights[path], tensor), f"{path} on {mesh} by {strategy}"
        report = audit(plan)
        for rank, (_, receipt, held) in enumerate(found):
            here = mesh.coordinate(rank)
            assert receipt == predict(plan, rank), f"rank {rank} on {mesh} by {strategy}"
            assert receipt.held_bytes == sum(spec.local_bytes(here) for spec in plan.tree.values())
            assert held <= receipt.held_bytes
            memory = report.memory(rank)
            assert (memory.held_bytes, memory.executing_bytes) == (receipt.held_bytes, receipt.peak_bytes)


def test_one_process_makes_what_its_init_code_says(alone):
    assert torch.equal(alone["plain.padded_kept"], torch.arange(39.0).view(13, 3))
    frame = alone["plain.uneven_opaque"]
    torch.testing.assert_close(frame.T @ frame, torch.eye(5), rtol=1e-4, atol=1e-5)
    assert not alone["embed.weight"][12].any()
    for name, (shape, _) in OVER_TENSOR.items():
        drawn, bound = alone[f"plain.{name}_drawn"], torch.Size(shape[1:]).numel() ** -0.5
        assert bound * 0.7 < drawn.abs().max() <= bound


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_audit_gives_each_rank_its_own_bytes(strategy):
    plan = plan_build(schedule(Mesh(data=3, tensor=4)), strategy=strategy)
    report = audit(plan)
    for rank in range(plan.mesh.num_ranks):
        here, memory = plan.mesh.coordinate(rank), report.memory(rank)
        assert memory.parameter_bytes == sum(spec.local_bytes(here) for spec in plan.tree.values())
        assert memory.executing_bytes == predict(plan, rank).peak_bytes
    assert len({share.memory.parameter_bytes for share in report.shares}) > 2
