"""Planning is pure, and refuses what would hurt."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, plan_build
from shardplan.specs import Made, Mesh, PlanError, dumps, loads
from shardplan.specs.layout_steps import Sync
from shardplan.specs.steps import (
    Broadcast,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    MakeGroups,
    Place,
    Scatter,
    TakeWhole,
    Tie,
    Wrap,
)
from tests.helpers.models import llama, plain, schedule, split_llama, split_plain
from tests.helpers.pipelines import ARCHITECTURES
from tests.helpers.processes import run_python

TOKENS = {"input_ids": torch.empty(2, 8, dtype=torch.long, device="meta")}
CONFIG = {"train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}


def refusal(sch, **options):
    with pytest.raises(PlanError) as caught:
        plan_build(sch, **options)
    return str(caught.value)


def test_planning_twice_gives_the_same_plan():
    plans = [plan_build(schedule("llama", Mesh(data=2, tensor=2)), target="deepspeed", config=CONFIG) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].fingerprint != plan_build(schedule("llama", Mesh(data=2, tensor=2))).fingerprint


def test_every_process_plans_alike_and_starts_no_process_group_and_no_device():
    code = """
import sys, torch
from shardplan.functional import audit, plan_build
from shardplan.specs import Mesh
from tests.helpers.models import schedule
from tests.helpers.pipelines import ARCHITECTURES

print(plan_build(schedule("plain", Mesh(tensor=2))).fingerprint)
for name in ("llama", "t5"):
    print(ARCHITECTURES[name].plan(ARCHITECTURES[name].make("meta")).fingerprint)
config = {"train_batch_size": 64, "gradient_clipping": 1.0}
assert audit(plan_build(schedule("plain", Mesh(data=64, tensor=8)), target="deepspeed", config=config)).ok
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert "deepspeed" not in sys.modules
"""
    here = [plan_build(schedule("plain", Mesh(tensor=2)))]
    here += [ARCHITECTURES[name].plan(ARCHITECTURES[name].make("meta")) for name in ("llama", "t5")]
    assert run_python(code, PYTHONHASHSEED="77").split() == [plan.fingerprint for plan in here]


def test_a_saved_plan_is_the_plan():
    plan = plan_build(schedule("llama", Mesh(data=2, tensor=2)), target="deepspeed", config=CONFIG)
    loaded = loads(dumps(plan))
    assert loaded == plan
    assert loaded.runtime.model is None
    assert loaded.config["zero_optimization"]["stage"] == 1


def test_a_lambda_runs_but_is_not_saved():
    sch = schedule("plain").at["blocks.0.up.weight"].init(lambda weight: nn.init.orthogonal_(weight))  # noqa: PLW0108  it is to be nameless
    assert "test_plan:" in plan_build(sch).callables[0]
    with pytest.raises(PlanError, match=r"<lambda>: a lambda, closure or other nameless function runs, but cannot be saved"):
        dumps(plan_build(sch))


def test_a_lambda_whose_program_is_known_is_saved_as_that():
    plan = plan_build(schedule("plain").at["blocks.0.up.weight"].init(lambda weight: weight.fill_(2)))
    assert plan.callables == ()
    assert str(loads(dumps(plan)).tree["blocks.0.up.weight"].source) == "fill(2)"


def moves(sch, strategy):
    kinds = (Generate, TakeWhole, EvaluateWhole, EvaluateShard, Scatter, Broadcast, Place)
    return [step for step in plan_build(sch, strategy=strategy).steps if isinstance(step, kinds)]


def mixed():
    """One tensor with values, one that has a program, and one that has none."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), *(nn.Linear(4, 4, bias=False, device="meta") for _ in range(2)))
    return create_schedule(model, Mesh(tensor=2)).at["2.weight"].init(nn.init.orthogonal_)


@pytest.mark.parametrize("strategy", ["auto", "local"])
def test_locally_only_what_has_no_program_is_sent(strategy):
    evaluate, place, *sent = moves(mixed(), strategy)
    assert evaluate == EvaluateShard(0, ("1.weight",))
    assert place == Place(0, ("1.weight",))
    paths = ("0.weight", "2.weight")
    assert [type(step) for step in sent] == [Generate, TakeWhole, Broadcast, Place]
    assert sent[0].paths == ("2.weight",)
    assert sent[1:] == [TakeWhole(0, ("0.weight",)), Broadcast(0, paths, ("tensor",)), Place(0, paths)]
    split = moves(mixed().at["**.weight"].shard(axis=0).at["2"].sync("forward_post", "all_gather", -1), strategy)
    assert Scatter(0, paths, ("tensor",)) in split


@pytest.mark.parametrize("strategy", ["scatter", "broadcast"])
def test_programs_are_evaluated_whole_right_before_they_are_sent(strategy):
    steps = moves(schedule("llama", Mesh(data=2, tensor=2)), strategy)
    assert not [step for step in steps if isinstance(step, (EvaluateShard, Generate, TakeWhole))]
    for step, after in pairwise(steps):
        if isinstance(step, EvaluateWhole):
            assert isinstance(after, Scatter | Broadcast)
            assert after.paths == step.paths
    evaluated = [path for step in steps if isinstance(step, EvaluateWhole) for path in step.paths]
    assert sorted(evaluated) == sorted(plan_build(schedule("llama")).tree)
    assert {type(step) for step in moves(mixed(), strategy)} == {Generate, TakeWhole, EvaluateWhole, Broadcast, Place}


def test_what_has_no_program_says_why():
    plan = plan_build(mixed())
    assert {path: type(spec.source) is Made for path, spec in plan.tree.items()} == {
        "0.weight": False,
        "1.weight": False,
        "2.weight": True,
    }
    assert plan.tree["2.weight"].source.cause


def test_steps_that_mean_nothing_on_a_mesh_are_left_out():
    steps = plan_build(schedule("llama", Mesh())).steps
    assert not [step for step in steps if isinstance(step, (Sync, MakeGroups))]
    assert steps[-1] == Wrap(None)


def test_groups_are_those_that_are_needed():
    def groups(mesh, strategy="scatter", **options):
        options["strategy"] = strategy
        return [step.over for step in plan_build(schedule("llama", mesh), **options).steps if isinstance(step, MakeGroups)]

    assert groups(Mesh(tensor=2)) == [(("tensor",),)]
    assert groups(Mesh(data=2, tensor=2)) == [(("data",), ("data", "tensor"), ("tensor",))]
    assert groups(Mesh(data=2)) == [(("data",),)]
    assert groups(Mesh(tensor=2), target="deepspeed", config=CONFIG) == [(("data",), ("tensor",))]
    assert groups(Mesh(data=2, tensor=2), "local") == [(("tensor",),)]
    assert groups(Mesh(data=2), "local") == []
    assert groups(Mesh(data=2), "local", target="deepspeed", config=CONFIG) == [(("data",), ("tensor",))]


def test_ties_are_steps():
    assert plan_build(schedule("plain")).ties == (Tie(0, "embed.weight", ("head.weight",)),)


def test_a_forward_pass_at_local_shapes_accepts_what_fits():
    assert plan_build(schedule("llama", Mesh(tensor=4)), example_inputs=TOKENS)
    assert plan_build(schedule("plain", Mesh(tensor=2)), example_inputs={"ids": TOKENS["input_ids"]})


def test_a_forward_pass_at_local_shapes_rejects_what_does_not_meet():
    sch = create_schedule(llama(), Mesh(tensor=2)).at["model.layers.*.mlp.{gate,up}_proj"].colwise()
    message = refusal(sch, example_inputs=TOKENS)
    assert "model.layers.0.mlp.down_proj: a forward pass at local shapes stops in this Linear: RuntimeError: " in message
    assert "add a .sync" in message


def test_a_forward_pass_names_the_split_tensors_around_it():
    sch = create_schedule(plain(), Mesh(tensor=2)).at["blocks.1.norm.weight"].shard(axis=0)
    message = refusal(sch, example_inputs={"ids": TOKENS["input_ids"]})
    assert "blocks.1.norm: a forward pass at local shapes stops in this LayerNorm with weight f32[16@tensor]" in message


def test_a_bias_that_a_forward_of_its_own_would_add_on_every_rank_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    sch = create_schedule(Scaled(4, 4, device="meta"), Mesh(tensor=2)).at[""].rowwise()
    assert "Scaled has a forward of its own, so that it would be added 2 times" in refusal(sch)


def test_an_unknown_target_lists_the_known():
    assert "target: 'deepsped' is unknown\n      There are None, deepspeed, torch; the closest is deepspeed" in refusal(
        schedule("plain"), target="deepsped"
    )


def test_a_config_needs_a_target():
    assert "config: it is given, and there is no target to read it" in refusal(schedule("plain"), config=CONFIG)


def test_stages_without_a_cut_are_refused():
    assert "the mesh has pipe=2, and nothing is cut" in refusal(schedule("plain", Mesh(pipe=2, tensor=2)))


@pytest.mark.parametrize(
    ("mesh", "config", "text"),
    [
        (Mesh(), None, "config: DeepSpeed needs its configuration"),
        (Mesh(), "ds.json", "config: it is plain JSON values by name, not 'ds.json'"),
        (Mesh(), {"gradient_clipping": 1.0}, "it has neither train_batch_size nor train_micro_batch_size_per_gpu"),
        (Mesh(), {**CONFIG, "train_batch_size": "auto"}, "config.train_batch_size: it is a positive integer, not 'auto'"),
        (
            Mesh(data=4),
            {**CONFIG, "train_batch_size": 6},
            "6 is no multiple of micro batch 1 x accumulation steps 1 x data 4 = 4\n      Write 8",
        ),
        (
            Mesh(data=2),
            {**CONFIG, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1},
            "8 is not micro batch 2 x accumulation steps 1 x data 2 = 4\n      Write 4",
        ),
        (Mesh(), {"train_batch_size": 4}, "config.gradient_clipping: it is not written"),
        (Mesh(), {**CONFIG, "zero_optimization": {"stage": 4}}, "config.zero_optimization.stage: it is 0, 1, 2 or 3, not 4"),
        (
            Mesh(tensor=2),
            {**CONFIG, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
            "ZeRO 0 with bf16, tensor=2 and gradient clipping computes a wrong norm, silently",
        ),
        (
            Mesh(),
            {**CONFIG, "zero_optimization": {"stage": 0}, "fp16": {"enabled": True}},
            "ZeRO 0 with fp16 neither scales the loss nor unscales gradients, silently",
        ),
        (
            Mesh(),
            {**CONFIG, "zero_optimization": {}, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}},
            "ZeRO 0 with bf16 and AdamW takes one optimizer step too many, silently",
        ),
        (
            Mesh(pipe=2),
            {**CONFIG, "zero_optimization": {"stage": 0}},
            "ZeRO 0 in fp32 with pipe=2 and gradient clipping computes a wrong norm, silently",
        ),
        (Mesh(), {**CONFIG, "optimizer": {"type": "SGD"}}, "ZeRO 1 refuses SGD at launch unless it is told otherwise"),
        (
            Mesh(),
            {**CONFIG, "x": {"y": [torch.float32]}},
            "config.x.y[0]: a plan holds plain, finite JSON values with strings as keys, and this is torch.float32",
        ),
    ],
)
def test_what_deepspeed_refuses_or_gets_wrong_is_refused_in_the_plan(mesh, config, text):
    assert text in refusal(split_plain(plain(), mesh), target="deepspeed", config=config)


def test_parameters_split_over_data_are_not_for_deepspeed():
    sch = split_plain(plain(), Mesh(data=2)).at["blocks.0.norm.weight"].shard(axis=0, mesh_axis="data")
    assert "blocks.0.norm.weight  f32[16@data]: it is split over 'data', over which DeepSpeed averages" in refusal(
        sch, target="deepspeed", config=CONFIG
    )


@pytest.mark.parametrize("config", [{1: 2}, {"x": float("nan")}])
def test_a_config_that_json_cannot_hold_is_refused_with_its_place(config):
    assert "a plan holds plain, finite JSON values with strings as keys" in refusal(
        schedule("plain"), target="deepspeed", config={**CONFIG, **config}
    )


def test_init_code_with_other_arguments_is_refused():
    assert "init_weights: it is (module) or (module, path), not (module, std)" in refusal(
        schedule("plain"), init_weights=lambda module, std: None
    )


@pytest.mark.parametrize("values", [{"x": object()}, {"x": [torch.ones(1)]}])
def test_plans_hold_plain_values(values):
    sch = create_schedule(llama(), Mesh())
    assert "a plan holds plain values" in refusal(sch.at["model.norm"].tag(**values))
    assert "a plan holds plain values" in refusal(sch.at["lm_head"].set(in_features=values["x"]))


def test_a_tensor_is_no_attribute_to_set():
    assert "its 'weight' is no plain attribute" in refusal(create_schedule(llama(), Mesh()).at["lm_head"].set(weight=1))


def test_the_design_example_is_split_as_it_says():
    plan = plan_build(split_llama(llama(), Mesh(data=2, tensor=4)), example_inputs=TOKENS)
    assert plan.tree["model.layers.0.self_attn.k_proj.weight"].local_shape(plan.mesh.coordinate(5)) == (8, 64)
