"""Each law holds for the plans that are built, and fails for a plan that breaks it, with the path."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from torch import nn

from shardplan.functional import audit, create_schedule, plan_build
from shardplan.functional.auditing.proofs import _gap
from shardplan.specs import Distinct, Mesh, ModuleValues, OwnValues, Shard
from shardplan.specs.layout_steps import SumGradient
from shardplan.specs.proof import LAWS
from shardplan.specs.shard import Held
from shardplan.specs.steps import (
    Allocate,
    Broadcast,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    MakeGroups,
    MakeOptimizer,
    MakeTieGroups,
    Place,
    Scatter,
    SendCopy,
    Slice,
    SumTied,
    TakeShard,
    TakeStages,
    TakeWhole,
    Tie,
    Wrap,
)
from tests.helpers.findings import mixture
from tests.helpers.models import plain, schedule

DATA_TENSOR = Mesh(data=2, tensor=2)


def broken(plan, change):
    """The plan with other steps; ``change`` gives what takes the place of each."""
    return evolve(plan, steps=[new for step in plan.steps for new in change(step)])


def without(kind):
    return lambda step: [] if isinstance(step, kind) else [step]


def failures(plan):
    """What fails, by law."""
    return {proof.law: proof.failures for proof in audit(plan).proofs if proof.failures}


def tied_chain():
    """Two stages that hold one weight."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    sch = create_schedule(model, Mesh(pipe=2, data=2)).at["1"].cut_pipeline_stage()
    return plan_build(sch, example_inputs={"input": torch.ones(2, 8)})


@pytest.mark.parametrize("strategy", ["local", "scatter", "broadcast"])
@pytest.mark.parametrize("name", ["llama", "plain"])
def test_all_laws_hold_for_what_is_planned(name, strategy):
    sch = schedule(name, Mesh(data=4, tensor=2)).at["{lm_head,blocks.0.up}.weight"].init(nn.init.orthogonal_)
    report = audit(plan_build(sch, strategy=strategy))
    assert [proof.law for proof in report.proofs] == list(LAWS)
    assert all(proof.holds for proof in report.proofs if proof.law != "equal"), failures(plan_build(sch, strategy=strategy))
    assert report.proof("cover").num_cases > 10
    assert not failures(tied_chain())


def test_a_tensor_that_is_not_placed_or_placed_twice_is_not_covered():
    plan = plan_build(schedule("plain", DATA_TENSOR))

    def skip(step):
        paths = tuple(path for path in getattr(step, "paths", ()) if path != "blocks.1.up.weight")
        return [Place(step.stage, paths)] if isinstance(step, Place) else [step]

    (failure, *_) = failures(broken(plan, skip))["cover"]
    assert (failure.path, failure.cause) == ("blocks.1.up.weight", "Coordinate(pipe=0, data=0, tensor=0) never gets it")
    again = (EvaluateShard(0, ("blocks.1.up.weight",)), Place(0, ("blocks.1.up.weight",)))
    twice = evolve(plan, steps=[*plan.steps[:-2], *again, *plan.steps[-2:]])
    assert "gets it more than once" in failures(twice)["cover"][0].cause
    assert "makes it twice" in failures(twice)["source"][0].cause


def test_a_part_that_is_not_the_planned_one_is_not_covered():
    plan = plan_build(schedule("plain", DATA_TENSOR), strategy="broadcast")
    found = failures(broken(plan, without(Slice)))
    paths = {spec.path for spec in plan.tree.values() if spec.shards}
    assert {failure.path for failure in found["cover"]} == paths
    assert "holds embed.weight (((0, 64),), ((0, 16),)), and its part is (((0, 32),), ((0, 16),))" in found["cover"][0].cause


def test_what_a_step_takes_up_must_be_there():
    plan = plan_build(schedule("plain", DATA_TENSOR), strategy="scatter")
    found = failures(broken(plan, without(EvaluateWhole)))
    assert any("a step takes it up, and the rank does not hold it by then" in failure.cause for failure in found["cover"])


def test_entries_that_nobody_or_several_hold_are_a_gap():
    class Short(Shard):
        def held(self, size, coordinate):
            return tuple(Held(part.start, part.stop - 1) for part in super().held(size, coordinate))

    class Long(Shard):
        def held(self, size, coordinate):
            return (Held(0, size),)

    assert _gap(Shard(0), 8, Mesh(tensor=4)) == ""
    assert _gap(Short(0), 8, Mesh(tensor=4)) == "nobody holds entries 1 to 2 of axis 0"
    assert _gap(Long(0), 8, Mesh(tensor=4)) == "several places hold entries 0 to 8 of axis 0"
    assert _gap(Short(0), 8, Mesh()) == "nobody holds entries 7 to 8 of axis 0"


def test_a_tensor_without_a_source_or_with_two_fails():
    plan = plan_build(schedule("plain", DATA_TENSOR))

    def leave(step):
        return [Allocate(step.stage, step.paths)] if isinstance(step, EvaluateShard) else [step]

    causes = {failure.path: failure.cause for failure in failures(broken(plan, leave))["source"]}
    assert causes["blocks.0.up.weight"].endswith("and no step gives it values")
    assert set(causes) == set(plan.tree)


def test_init_code_that_runs_on_several_ranks_gives_several_sources():
    model = plain(device="cpu")
    plan = plan_build(create_schedule(model, DATA_TENSOR))
    assert all(isinstance(spec.source, ModuleValues) for spec in plan.tree.values())

    def everywhere(step):
        if isinstance(step, TakeWhole):
            return [TakeShard(step.stage, step.paths)]
        return [] if isinstance(step, (Broadcast, Scatter, Slice)) else [step]

    found = failures(broken(plan, everywhere))
    assert {failure.path for failure in found["source"]} == set(plan.tree)
    assert found["source"][0].cause.endswith("make it, each in its own way")


def test_a_source_that_is_not_the_planned_one_fails():
    plan = plan_build(schedule("plain", DATA_TENSOR))
    path = "blocks.0.up.weight"
    tree = plan.tree.replace({path: evolve(plan.tree[path], source=OwnValues())})
    ((failure),) = failures(evolve(plan, tree=tree))["source"]
    assert failure.path == path
    assert "its spec says own values" in failure.cause
    assert "from another source: program" in failure.cause


def test_an_opaque_tensor_is_made_once():
    sch = schedule("plain", DATA_TENSOR).at["blocks.0.up.weight"].init(nn.init.orthogonal_)
    plan = plan_build(sch)
    found = failures(broken(plan, lambda step: [step, step] if isinstance(step, Generate) else [step]))
    assert [(failure.path, failure.cause) for failure in found["source"]] == [
        ("blocks.0.up.weight", "Coordinate(pipe=0, data=0, tensor=0) makes it twice")
    ]


def test_a_tie_that_is_not_made_again_fails():
    found = failures(broken(plan_build(schedule("plain", DATA_TENSOR)), without(Tie)))
    assert "has other tensors at head.weight" in found["ties"][0].cause
    assert found["ties"][0].path == "embed.weight"


def test_a_tie_over_stages_needs_one_gradient_and_one_source():
    plan = tied_chain()
    found = failures(broken(plan, without(SumTied)))
    assert {failure.path for failure in found["ties"]} == {"0.weight"}
    assert "does not sum its gradient over places (0, 1) along 'pipe'" in found["ties"][0].cause
    made = plan_build(
        create_schedule(plan.runtime.model, plan.mesh).at["0"].init(nn.init.orthogonal_).at["1"].cut_pipeline_stage(),
        example_inputs={"input": torch.ones(2, 8)},
    )
    assert not failures(made)
    assert "cover" in failures(broken(made, without(SendCopy)))


def test_a_sum_over_stages_needs_its_group():
    found = failures(broken(tied_chain(), without(MakeTieGroups)))["order"]
    assert any("no step makes the group of places (0, 1) that the sum of its gradient needs" in f.cause for f in found)


def repeated_granules():
    """Two heads of two features over four ranks."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 8))
    sch = create_schedule(model, Mesh(tensor=4)).at["0"].colwise(granule=2, replicate=True)
    return plan_build(sch.at["0"].silence("SP010", reason="it is the sum of its gradient that matters"))


@pytest.mark.parametrize(
    ("plan", "path"),
    [
        (lambda: mixture(Mesh(data=2, expert=2), split=True), "model.layers.0.mlp.experts.gate_up_proj"),
        (lambda: mixture(Mesh(data=4, expert=2), split=True), "model.layers.1.mlp.experts.down_proj"),
        (repeated_granules, "0.weight"),
        (repeated_granules, "0.bias"),
    ],
)
def test_what_ranks_share_has_one_sum_of_its_gradient(plan, path):
    plan = plan()
    module, _, name = path.rpartition(".")
    (planned,) = (s for s in plan.steps if isinstance(s, SumGradient) and (s.module, s.name) == (module, name))
    assert audit(plan).proof("once").num_cases > 2
    assert not failures(plan)
    for other, cause in (
        ([], "no step sums its gradient"),
        ([planned, planned], "2 steps sum its gradient"),
        ([evolve(planned, divide=7)], f"a step sums its gradient otherwise: {evolve(planned, divide=7)}"),
    ):
        edited = broken(plan, lambda step, other=other: other if step == planned else [step])
        (failure,) = failures(edited)["once"]
        assert (failure.path, failure.cause) == (path, f"{cause}, and its split asks for one: {planned}")
        assert not audit(edited).ok


@pytest.mark.parametrize(
    ("kind", "missing", "again"),
    [
        (Wrap, "no steps hand the module to its target (Wrap), and one must", "2 steps hand the module"),
        (MakeOptimizer, None, "2 steps make an optimizer (MakeOptimizer), and one at most may"),
        (TakeStages, "no steps keep the stages of a rank (TakeStages): the model has stages", "2 steps keep the stages"),
        (SumTied, None, "its gradient is summed along 'pipe' 2 times"),
    ],
)
def test_a_module_is_handed_over_once(kind, missing, again):
    plan = tied_chain()
    for change, cause in ((without(kind), missing), (lambda s: [s, s] if isinstance(s, kind) else [s], again)):
        found = failures(broken(plan, change)).get("once", ())
        assert [failure.cause.startswith(cause) for failure in found] == [True] if cause else not found


def test_what_is_not_planned_is_not_handed_over():
    plan = plan_build(schedule("plain", DATA_TENSOR))
    (failure,) = failures(broken(plan, lambda s: [TakeStages(), s] if isinstance(s, Wrap) else [s]))["once"]
    assert failure.cause == "1 steps keep the stages of a rank (TakeStages): the model is not cut, and none may"
    (failure,) = failures(broken(plan, lambda s: [Wrap("torch")] if isinstance(s, Wrap) else [s]))["once"]
    assert failure.cause == "its target is None, and the module is handed to torch"


def test_a_rank_that_touches_another_stage_fails():
    plan = tied_chain()
    tree = plan.tree.replace({"0.weight": evolve(plan.tree["0.weight"], also_on=())})
    found = failures(evolve(plan, tree=tree))
    assert found["stages"][0].path == "0.weight"
    assert "touches it, and it belongs to place 0 along 'pipe'" in found["stages"][0].cause


def test_a_collective_that_some_members_never_join_is_a_deadlock():
    plan = tied_chain()
    stray = [step for step in plan.steps if not isinstance(step, MakeGroups)]
    groups = next((step.over for step in plan.steps if isinstance(step, MakeGroups)), ())
    stray.insert(1, MakeGroups((*groups, ("pipe",))))
    stray.insert(-3, Broadcast(0, ("0.weight",), ("pipe",)))
    found = failures(evolve(plan, steps=stray))["order"]
    assert "waits in the broadcast over pipe of step" in found[0].cause
    assert found[0].cause.endswith("for Coordinate(pipe=1, data=0, tensor=0), which never comes")


def test_a_group_that_nobody_makes_fails():
    plan = plan_build(schedule("plain", DATA_TENSOR), strategy="scatter")
    found = failures(broken(plan, without(MakeGroups)))["order"]
    assert any("no step makes the group along ('tensor',) that the scatter over tensor of step" in f.cause for f in found)
    assert any("that its synchronisation needs" in failure.cause for failure in found)


def test_values_that_depend_on_the_layout_are_named():
    found = failures(plan_build(schedule("plain", DATA_TENSOR), init_weights=False))
    assert {failure.path for failure in found["values"]} == set(plan_build(schedule("plain")).tree)
    own = plan_build(create_schedule(plain(device="cpu"), DATA_TENSOR), init_weights=False)
    assert failures(own)["values"][0].cause == "each rank keeps the values that its own module has"


@pytest.mark.parametrize(
    "mesh", [Mesh(), Mesh(pipe=2, data=6, tensor=4, expert=3), Mesh(data=5, tensor=3), Mesh(data=4, expert=4)]
)
def test_every_rank_is_like_one_of_the_distinct_ones(mesh):
    tree = plan_build(schedule("plain", Mesh())).tree
    uneven = {
        path: evolve(tree[path], shards=(Shard(0, uneven=True, allow_empty=True),)) for path in ("blocks.0.up.weight",)
    }
    distinct = Distinct.of(mesh, tree.replace(uneven))
    spec = tree.replace(uneven)["blocks.0.up.weight"]
    counted = dict.fromkeys((place for place, _ in distinct.places()), 0)
    for rank in range(mesh.num_ranks):
        here = mesh.coordinate(rank)
        alike = distinct.like(here)
        counted[alike] += 1
        assert spec.local_shape(alike) == spec.local_shape(here)
        for mesh_axis in ("expert_data", "expert", "tensor", "data"):
            assert alike.is_first(mesh_axis) == here.is_first(mesh_axis)
    assert list(counted.items()) == list(distinct.places())
