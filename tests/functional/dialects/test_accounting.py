"""What is said of training from the plan alone; tests/distributed/test_states.py holds it against real processes."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.functional.dialects import dialect_of
from shardplan.functional.dialects.torch.optimizer import ARGUMENTS
from shardplan.functional.execute import _check
from shardplan.specs import Mesh, ParamSpec, Plan, PlanError, SpecTree
from tests.helpers.models import schedule

DEEPSPEED, TORCH = dialect_of("deepspeed"), dialect_of("torch")
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.8, 0.9]}}


def plan(config, target="torch", mesh=None):
    return plan_build(schedule("plain", mesh or Mesh()), target=target, config=config)


def refusal(optimizer):
    with pytest.raises(PlanError) as caught:
        plan({"optimizer": optimizer})
    return str(caught.value)


def test_the_named_optimizer_is_the_one_that_runs():
    built = execute(plan({"optimizer": ADAMW}), device="cpu")
    assert type(built.optimizer) is torch.optim.AdamW
    (group,) = built.optimizer.param_groups
    assert (group["lr"], group["betas"]) == (1e-2, (0.8, 0.9))
    trained = {parameter for parameter in built.module.parameters() if parameter.requires_grad}
    assert set(group["params"]) == trained
    assert TORCH.training(plan({"optimizer": ADAMW})).optimizer.name == "AdamW"
    assert execute(plan(None), device="cpu").optimizer is None


@pytest.mark.parametrize("target", ["torch", "deepspeed"])
def test_an_optimizer_beside_the_named_one_is_refused(target):
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0} if target == "deepspeed" else {}
    planned = plan({**config, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, target)
    with pytest.raises(PlanError, match=r"optimizer: one is given, and config\.optimizer names one"):
        _check(planned, planned.runtime.model, torch.optim.SGD, None)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (3, "config.optimizer: it is a type and its params, not 3\n      Write "),
        (
            {"type": "AdmaW"},
            "config.optimizer.type: 'AdmaW' is none whose states are known\n      There are Adam, AdamW, SGD; the",
        ),
        ({"type": "SGD", "params": 3}, "config.optimizer.params: they are the optimizer's arguments by name, not 3"),
        (
            {"type": "SGD", "params": {"momentun": 0.9}},
            "momentun: torch.optim.SGD takes no momentun\n      There are lr, mom",
        ),
        ({"type": "SGD", "lr": 0.1}, "config.optimizer.lr: it is not asked for"),
    ],
)
def test_a_wrong_optimizer_is_refused_with_the_nearest_fix(optimizer, text):
    assert text in refusal(optimizer)


def test_what_optimizers_take_is_what_torch_says():
    for name, arguments in ARGUMENTS.items():
        taken = set(inspect.signature(getattr(torch.optim, name)).parameters)
        assert set(arguments) == taken - {"params"}


def test_options_of_a_pipeline_are_refused_without_one():
    with pytest.raises(
        PlanError, match=re.escape("config.num_microbatches: it is for a pipeline, and the model is not cut")
    ):
        plan({"optimizer": ADAMW, "num_microbatches": 4})


@pytest.mark.parametrize(
    ("config", "num"),
    [
        ({"gradient_accumulation_steps": 3}, 3),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2}, 3),
        ({"train_batch_size": 24}, 1),
        ({"train_micro_batch_size_per_gpu": 2}, 1),
    ],
)
def test_micro_batches_are_those_that_deepspeed_derives(config, num):
    planned = Plan(Mesh(data=4), SpecTree(), (), target="deepspeed", config=config)
    assert DEEPSPEED.training(planned).num_microbatches == num


@pytest.mark.parametrize(("pipe", "num_local", "num"), [(2, 2, 4), (2, 3, 6), (4, 2, 8), (3, 2, 5), (2, 2, 2)])
def test_interleaved_stages_keep_what_torch_puts_in_their_order(pipe, num_local, num):
    """Against the order of actions that torch's own schedule computes."""
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, _ComputationType

    config = {"schedule": "interleaved_1f1b", "num_microbatches": num}
    stages = [nn.Sequential(nn.Linear(2, 2, device="meta")) for _ in range(pipe * num_local)]
    model = nn.Sequential(*stages)
    sch = create_schedule(model, Mesh(pipe=pipe))
    for number in range(len(stages) - 1):
        sch = sch.at[str(number)].cut_pipeline_stage()
    planned = plan_build(sch, target="torch", config=config, example_inputs={"input": torch.zeros(1, 2)})
    theirs = object.__new__(ScheduleInterleaved1F1B)
    theirs.pp_group_size, theirs.n_local_stages, theirs._n_microbatches = pipe, num_local, num
    theirs.number_of_rounds = max(1, num // pipe)
    theirs.microbatches_per_round = num // theirs.number_of_rounds
    most, kept = dict.fromkeys(range(len(stages)), 0), dict.fromkeys(range(len(stages)), 0)
    for place in range(pipe):
        for action in theirs._calculate_single_rank_operations(place):
            if action is None:
                continue
            kept[action.stage_index] += 1 if action.computation_type == _ComputationType.FORWARD else -1
            most[action.stage_index] = max(most[action.stage_index], kept[action.stage_index])
    assert {stage: TORCH.in_flight(planned, stage) for stage in most} == most


def test_the_parts_of_all_ranks_are_the_whole():
    """ZeRO 3 pads each parameter, ZeRO 1 all of them together."""
    tree = SpecTree([ParamSpec("a.weight", (7, 5), "float32"), ParamSpec("b.weight", (3, 3), "float32")])
    for stage, padded in ((1, 48), (3, 40 + 16)):
        config = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_optimization": {"stage": stage}}
        some = Plan(mesh := Mesh(data=8), tree, (), target="deepspeed", config=config)
        states = [DEEPSPEED.state(some, mesh.coordinate(rank)) for rank in range(8)]
        assert sum(state.master_bytes for state in states) == 4 * padded
        assert sum(state.optimizer_bytes for state in states) == 4 * padded


def test_an_unknown_optimizer_has_no_states():
    config = {"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": 0}}
    some = Plan(mesh := Mesh(), SpecTree([ParamSpec("a", (7,), "float32")]), (), target="deepspeed", config=config)
    assert DEEPSPEED.training(some).optimizer is None
    assert DEEPSPEED.state(some, mesh.coordinate(0)).optimizer_bytes == 0
    assert not list(DEEPSPEED.messages(some, mesh.coordinate(0)))
