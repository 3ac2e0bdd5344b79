"""A model on meshes with an axis ``context``, which a copy of the packages has: run by a process that imports it."""

from __future__ import annotations

import sys

import torch

from shardplan.functional import audit, create_schedule, execute, plan_build, predict
from shardplan.specs import MESH_AXES, Mesh, dumps, loads
from tests.helpers.models import plain
from tests.helpers.ranks import results, run_ranks

IDS = torch.tensor([[1, 5, 9, 63], [2, 4, 4, 0]])


def over_context(sch):
    """Split a layer and the next over ``context`` as ``.colwise()`` and ``.rowwise()`` do over ``tensor``."""
    for name in ("weight", "bias"):
        sch = sch.at["blocks.*.up"].expect(2).shard(name, axis=0, mesh_axis="context")
    sch = sch.at["blocks.*.up"].sync("backward_post", "all_reduce", mesh_axis="context")
    sch = sch.at["blocks.*.down"].expect(2).shard("weight", axis=1, mesh_axis="context")
    return sch.at["blocks.*.down"].sync("forward_post", "all_reduce", mesh_axis="context")


def over_both(sch):
    return over_context(sch).at["embed"].vocab_parallel().at["head"].colwise(gather_output=True)


CASES = (
    (Mesh(context=2), lambda sch: sch, {}),
    (Mesh(context=2), over_context, {"strategy": "scatter"}),
    (Mesh(context=2, tensor=2), over_both, {}),
    (Mesh(data=2, tensor=2), over_both, {"strategy": "scatter"}),
    (Mesh(data=2, context=2), over_context, {"target": "torch", "strategy": "scatter"}),
)


def plan_of(number):
    mesh, split, options = CASES[number]
    return plan_build(split(create_schedule(plain(), mesh)), seed=3, example_inputs={"ids": IDS}, **options)


def train(plan):
    """Execute a plan; return whether the receipt is the predicted one, the output, and the gradient of a whole tensor."""
    built = execute(plan, device="cpu", progress=False)
    output = built.model(IDS)
    output.square().mean().backward()
    return built.receipt, output.detach(), built.module.get_parameter("blocks.0.norm.weight").grad


def job(rank, number):
    plan = plan_of(number)
    receipt, output, gradient = train(plan)
    return receipt == predict(plan, rank), output, gradient


def main():
    assert MESH_AXES == ("pipe", "data", "context", "tensor")
    _, expected, gradient = train(plan_build(create_schedule(plain(), Mesh()), seed=3))
    for number in range(len(CASES)):
        plan = plan_of(number)
        report = audit(plan)
        assert report.ok, report
        assert loads(dumps(plan)) == plan
        for is_predicted, output, found in results(run_ranks(job, plan.mesh.num_ranks, number)):
            assert is_predicted
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
        sys.stdout.write(f"{plan.mesh}\n")


if __name__ == "__main__":
    main()
