"""Runtimes of other packages."""

from __future__ import annotations

import sys

import pytest
import torch
from attrs import evolve

from shardplan.functional import audit, execute, plan_build
from shardplan.specs import Mesh, PlanError, dumps, loads
from tests.helpers.models import schedule

OTHER = """
from shardplan.functional.dialects.handover import Wrapped
from shardplan.specs import Problem


class Shouting:
    def check(self, mesh, tree, layout, config):
        return [] if config else [Problem("config", "nothing to shout", "Write a word")]

    def check_pipeline(self, mesh, tree, pipeline, config):
        if pipeline is None:
            return [Problem("config", "it is to be shouted whole", "Cut nothing")] if config.get("parts") else []
        return [Problem("", f"one word cannot be shouted in {len(pipeline.stages)} parts", "Cut nothing")]

    def check_loss(self, plan, loss_fn):
        return [Problem("loss_fn", "a word has no loss", "Leave it out")]

    def groups(self, mesh):
        return ()

    def wrap(self, handover):
        word = handover.plan.config["word"]
        return Wrapped(model=(word.upper(), *handover.modules), optimizer=None, extras={"volume": 11})
"""


@pytest.fixture
def shouting(tmp_path, monkeypatch):
    """A package that is installed as packages are: a module and its entry point."""
    (tmp_path / "shouting.py").write_text(OTHER)
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shardplan.dialects]\nshout = shouting:Shouting\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("shouting", None)


@pytest.mark.usefixtures("shouting")
def test_a_dialect_of_another_package_checks_and_wraps():
    with pytest.raises(PlanError, match="config: nothing to shout\n      Write a word"):
        plan_build(schedule("plain"), target="shout")
    plan = plan_build(schedule("plain"), target="shout", config={"word": "hello"})
    built = execute(plan, device="cpu")
    assert built.model == ("HELLO", built.module)
    assert built.extras["volume"] == 11
    with pytest.raises(PlanError, match="There are None, deepspeed, shout, torch; the closest is shout"):
        plan_build(schedule("plain"), target="shoot")


@pytest.mark.usefixtures("shouting")
def test_a_dialect_of_another_package_refuses_stages_and_losses():
    config = {"word": "hello"}
    with pytest.raises(
        PlanError, match="1 problem\n  \\(model\\): one word cannot be shouted in 2 parts\n      Cut nothing"
    ):
        plan_build(
            schedule("plain", Mesh(pipe=2)).at["blocks.0"].cut_pipeline_stage(),
            target="shout",
            config=config,
            example_inputs={"ids": torch.zeros(2, 8, dtype=torch.long)},
        )
    with pytest.raises(PlanError, match="1 problem\n  config: it is to be shouted whole\n      Cut nothing"):
        plan_build(schedule("plain"), target="shout", config={**config, "parts": 2})
    with pytest.raises(PlanError, match="loss_fn: a word has no loss\n      Leave it out"):
        execute(plan_build(schedule("plain"), target="shout", config=config), device="cpu", loss_fn=len)


def test_a_size_of_zero_that_is_no_number_is_refused():
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
    }
    with pytest.raises(PlanError, match=r"config.zero_optimization.reduce_bucket_size: it is a number, not 'auto'"):
        plan_build(schedule("plain"), target="deepspeed", config=config)


@pytest.mark.parametrize(
    ("section", "value", "text"),
    [
        ("bf16", True, 'config.bf16: it is a section, not True\n      Write "bf16": {"enabled": true}, or false'),
        ("bf16", {"enabled": "auto"}, "config.bf16.enabled: it is true or false, not 'auto'\n      Write \"bf16\": {"),
        ("fp16", {"enabled": 1}, "config.fp16.enabled: it is true or false, not 1"),
        (
            "communication_data_type",
            "fp8",
            "config.communication_data_type: 'fp8' is unknown\n      There are fp32, fp16, bf16",
        ),
        (
            "data_types",
            {"grad_accum_dtype": "f4"},
            "config.data_types.grad_accum_dtype: 'f4' is unknown\n      There are fp32",
        ),
        ("data_types", "fp32", "config.data_types: it is a section, not 'fp32'"),
        (
            "optimizer",
            "AdamW",
            'config.optimizer: it is a type and its params, not \'AdamW\'\n      Write "optimizer": {"type"',
        ),
        ("optimizer", {"params": {"lr": 1}}, "config.optimizer: it is a type and its params, not {'params': {'lr': 1}}"),
        ("zero_optimization", True, "config.zero_optimization: it is a section with a stage, not True"),
        ("zero_optimization", {"stage": "auto"}, "config.zero_optimization.stage: it is 0, 1, 2 or 3, not 'auto'"),
        ("zero_optimization", {"stage": 3, "stage3_prefetch_bucket_size": "auto"}, "prefetch_bucket_size: it is a number"),
        ("gradient_clipping", "auto", "config.gradient_clipping: it is a number, not 'auto'"),
    ],
)
def test_what_deepspeed_reads_otherwise_or_not_at_all_is_refused(section, value, text):
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, section: value}
    with pytest.raises(PlanError) as refused:
        plan_build(schedule("plain"), target="deepspeed", config=config)
    assert text in str(refused.value)
    assert str(refused.value).startswith("1 problem\n")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("zero_optimization.reduce_bucket_size", {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}),
        ("zero_optimization.stage", {"zero_optimization": {"stage": "auto"}}),
        ("train_batch_size", {"train_batch_size": "auto"}),
    ],
)
def test_a_saved_plan_without_numbers_is_a_problem_and_no_traceback(name, change):
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}
    plan = plan_build(schedule("plain", Mesh(data=2)), target="deepspeed", config=config)
    saved = dumps(evolve(plan, config={**config, **change}))
    with pytest.raises(PlanError, match=rf"config.{name}: it is .* not 'auto'"):
        audit(loads(saved))
