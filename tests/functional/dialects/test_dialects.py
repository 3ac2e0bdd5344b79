"""Runtimes: one of another package, ones that nobody accounts for, and DeepSpeed where it is missing, broken or another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve

from shardplan.functional import audit, execute, plan_build, search
from shardplan.functional.dialects import dialect_of
from shardplan.functional.execute import _check
from shardplan.specs import Mesh, PlanError, dumps, loads
from shardplan.specs.steps import Wrap
from tests.helpers.models import schedule
from tests.helpers.ranks import results, run_ranks
from tests.helpers.runtime_probe import Messages

ROOT = Path(__file__).parents[3]
TOY = "tests.functional.dialects.toy_dialect:ToyDialect"
CONFIG = {"num_microbatches": 2}
DEEPSPEED = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}


def install(folder, name, version="1.0", **dialects):
    """Put a package there as it is installed: its folder of metadata, with entry points."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = "".join(f"{target} = {place}\n" for target, place in dialects.items())
    (info / "entry_points.txt").write_text(f"[shardplan.dialects]\n{points}")
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder from which Python imports, before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def toy(folder):
    return install(folder, "toy", toy=TOY)


def toy_plan(mesh, config=CONFIG):
    return plan_build(schedule("plain", mesh), target="toy", config=config)


def retargeted(plan, target):
    """A plan as it is saved by somebody who has a runtime that is not here."""
    steps = [evolve(step, target=target) if isinstance(step, Wrap) else step for step in plan.steps]
    return loads(dumps(evolve(plan, target=target, steps=steps)))


@pytest.mark.usefixtures("toy")
def test_a_dialect_of_another_package_checks_plans():
    with pytest.raises(PlanError, match=r"config: the toy needs its configuration\n      config={"):
        plan_build(schedule("plain"), target="toy")
    with pytest.raises(PlanError, match="There are None, deepspeed, torch, toy; the closest is toy"):
        plan_build(schedule("plain"), target="tou")
    with pytest.raises(PlanError, match=r"1 problem\n  \(model\): the toy is whole, and the model is cut into 2 stages"):
        plan_build(
            schedule("plain", Mesh(pipe=2)).at["blocks.0"].cut_pipeline_stage(),
            target="toy",
            config=CONFIG,
            example_inputs={"ids": torch.zeros(2, 8, dtype=torch.long)},
        )


@pytest.mark.usefixtures("toy")
def test_a_dialect_of_another_package_accounts_for_itself():
    plan = toy_plan(Mesh(data=16))
    report = audit(plan)
    memory, (sent,) = report.worst.memory, report.training
    size = sum(spec.num_bytes for spec in plan.tree.values() if spec.requires_grad)
    assert report.num_microbatches == 2
    assert (memory.gradient_bytes, memory.optimizer_bytes, memory.bucket_bytes) == (size,) * 3
    assert (sent.cargo, sent.op, sent.num_bytes) == ("gradients", "all_reduce", 2 * size)
    assert [(finding.code, finding.cause) for finding in report.findings] == [("SP022", "a toy with 16 ranks is slow")]
    assert report.ok


@pytest.mark.usefixtures("toy")
def test_a_dialect_of_another_package_wraps():
    plan = toy_plan(Mesh())
    with pytest.raises(PlanError, match="loss_fn: the toy computes its own loss\n      Leave it out"):
        execute(plan, device="cpu", loss_fn=len)
    built = execute(plan, device="cpu")
    before = built.module.embed.weight.clone()
    built.model.step(torch.ones(2, 8, dtype=torch.long))
    assert built.extras["volume"] == 11
    assert not torch.equal(built.module.embed.weight, before)
    states = sum(state["momentum_buffer"].nbytes for state in built.optimizer.state.values())
    assert states == audit(plan).worst.memory.optimizer_bytes


@pytest.mark.usefixtures("toy")
def test_a_search_is_for_a_dialect_of_another_package_too():
    given = {"num_ranks": 2, "device_memory": 2**30, "init_weights": False, "target": "toy", "config": CONFIG}
    found = search(lambda mesh: schedule("plain", mesh), **given)
    assert {str(candidate.mesh) for candidate in found.candidates if candidate.fits} == {
        "mesh pipe=1 data=1 tensor=2",
        "mesh pipe=1 data=2 tensor=1",
    }


def train_toy(rank, folder):
    sys.path.insert(0, folder)
    built = execute(toy_plan(Mesh(data=2)), device="cpu", progress=False)
    with Messages(lambda *_: None, (0, 1)) as messages:
        built.model.step(torch.full((2, 8), rank, dtype=torch.long))
    return messages.sent, built.module.head.weight.detach()


def test_a_dialect_of_another_package_sends_what_it_says(toy):
    (sent, first), (_, second) = results(run_ranks(train_toy, 2, toy))
    (row,) = audit(toy_plan(Mesh(data=2))).training
    assert sent == {("all_reduce", (0, 1)): row.num_bytes}
    assert torch.equal(first, second)


def test_a_saved_plan_for_a_runtime_that_is_not_here_is_an_error_of_the_audit():
    plan = retargeted(plan_build(schedule("plain", Mesh(data=2))), "fsdp2")
    report = audit(plan)
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.fix) == ("SP033", "error", "There are None, deepspeed, torch")
    assert finding.cause.startswith("target 'fsdp2' is unknown: memory and messages of training are counted as if")
    assert not report.ok
    assert report.worst.memory.parameter_bytes  # what is known is said
    with pytest.raises(PlanError, match=r"target 'fsdp2' is unknown: .*\n      There are None, deepspeed, torch") as caught:
        _check(plan, schedule("plain").runtime.model, None, None)
    assert len(caught.value.problems) == 1


def test_a_dialect_that_does_not_account_for_itself_is_an_error_of_the_audit(folder, monkeypatch):
    install(folder, "old", old="old_dialect:Old")
    methods = "".join(
        f"    {name} = ToyDialect.{name}\n" for name in ("check", "check_pipeline", "check_loss", "groups", "wrap")
    )
    text = (
        "from tests.functional.dialects.toy_dialect import ToyDialect\n\n\nclass Old:\n    wrong_numbers = lambda *_: ()\n"
    )
    (folder / "old_dialect.py").write_text(text + methods)
    monkeypatch.delitem(sys.modules, "old_dialect", raising=False)
    plan = plan_build(schedule("plain"), target="old", config=CONFIG)
    (finding,) = audit(plan).findings
    lacking = "pipeline_options, training, in_flight, state, messages, findings, holding"
    cause = f"Old, the dialect of target 'old', does not account for itself: it has no {lacking}"
    assert (finding.code, finding.cause.partition(": memory")[0]) == ("SP033", cause)
    with pytest.raises(PlanError, match="Old, the dialect of target 'old', does not account for itself"):
        execute(plan, device="cpu")


def test_a_dialect_whose_package_is_broken_is_a_problem_and_no_traceback(folder):
    install(folder, "broken", broken="no_such_module:Broken")
    with pytest.raises(PlanError, match="target: 'broken' cannot be loaded from no_such_module:Broken: ModuleNotFoundError"):
        plan_build(schedule("plain"), target="broken")
    assert [f.code for f in audit(retargeted(plan_build(schedule("plain")), "broken")).findings] == ["SP033"]


BLOCKED = """
import importlib.util
import sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "deepspeed" else find(name, package)


class Blocker:
    error = ImportError("not yet")

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise self.error


blocker = Blocker()
sys.meta_path.insert(0, blocker)

import torch
import torch.distributed as dist
from shardplan.functional import audit, execute, plan_build
from shardplan.specs import Mesh
from tests.helpers.models import schedule

ids = torch.ones(2, 8, dtype=torch.long)
for target, config in ((None, None), ("torch", {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})):
    built = execute(plan_build(schedule("plain"), target=target, config=config), device="cpu")
    built.model(ids).sum().backward()
config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}
plan = plan_build(schedule("plain"), target="deepspeed", config=config)
print("ok", audit(plan).ok)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for error in (
    ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed"),
    ImportError("an older torch is needed"),
    RuntimeError("no CUDA_HOME"),
):
    blocker.error = error
    try:
        execute(plan, device="cpu")
    except Exception as refused:
        print(refused)
"""


def test_without_deepspeed_its_target_alone_is_refused():
    """In a process where it is missing, and where it is there and broken."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok True\n")
    causes = re.findall(r"target: 'deepspeed' needs the package deepspeed, and (.*)\n +(.*)\n", done.stdout)
    assert causes == [
        ("it is not installed", "pip install 'deepspeed==0.19.*'"),
        ("its import fails: ImportError: an older torch is needed", "pip install 'deepspeed==0.19.*'"),
        ("its import fails: RuntimeError: no CUDA_HOME", "pip install 'deepspeed==0.19.*'"),
    ]


@pytest.mark.parametrize(("version", "is_other"), [("0.19.0", False), ("0.19.12", False), ("0.20.1", True), ("1.19", True)])
def test_another_version_of_deepspeed_is_a_finding_that_names_both(folder, version, is_other):
    install(folder, "deepspeed", version)
    plan = plan_build(schedule("plain"), target="deepspeed", config=DEEPSPEED)
    found = [finding for finding in audit(plan).findings if finding.code == "SP034"]
    assert len(found) == is_other
    assert all(re.search(rf"{version} is installed.* of 0\.19:", finding.cause) for finding in found)
    assert not audit(plan_build(schedule("plain"), target="torch")).findings


def test_nothing_is_said_of_a_version_where_deepspeed_is_not_installed(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from shardplan.functional.dialects.deepspeed import checks

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", version)
    assert list(checks.another_version()) == []


def test_numbers_of_a_saved_plan_for_torch_are_looked_at():
    plan = plan_build(schedule("plain"), target="torch", config={})
    with pytest.raises(PlanError, match=r"config\.num_microbatches: it is a positive integer, not 'auto'"):
        audit(loads(dumps(evolve(plan, config={"num_microbatches": "auto"}))))
    assert dialect_of("torch").training(plan).num_microbatches == 1


def test_a_size_of_zero_that_is_no_number_is_refused():
    config = {**DEEPSPEED, "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}
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
    config = {**DEEPSPEED, section: value}
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
    plan = plan_build(schedule("plain", Mesh(data=2)), target="deepspeed", config=DEEPSPEED)
    saved = dumps(evolve(plan, config={**DEEPSPEED, **change}))
    with pytest.raises(PlanError, match=rf"config.{name}: it is .* not 'auto'"):
        audit(loads(saved))
