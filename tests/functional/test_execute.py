"""Carrying a plan out in one process, and over effects of the caller's."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from attrs import evolve
from torch import nn

from shardplan.functional import build, consolidate_model, create_schedule, execute, plan_build, predict
from shardplan.functional.interpreter.dry_run import DryRun
from shardplan.specs import Mesh, PlanError, dumps, loads
from tests.helpers.models import llama, plain, schedule
from tests.helpers.processes import run_on_terminal


def fill_with_ones(tensor):
    """A function that a saved plan finds again."""
    tensor.fill_(1)


def test_built_unpacks_and_carries_the_rest():
    built = execute(plan_build(schedule("plain")), device="cpu", optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    model, optimizer = built
    assert model is built.module
    assert isinstance(optimizer, torch.optim.SGD)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert built.receipt.num_tensors == len(plan_build(schedule("plain")).tree)


def test_without_optimizer_there_is_none():
    _, optimizer = execute(plan_build(schedule("plain")), device="cpu")
    assert optimizer is None


def test_the_receipt_is_the_predicted_one_and_tells_the_bytes_of_real_storages():
    plan = plan_build(schedule("llama"))
    built = execute(plan, device="cpu")
    assert built.receipt == predict(plan, 0)
    tensors = {id(t): t for t in (*built.module.parameters(), *built.module.buffers())}.values()
    assert built.receipt.held_bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert built.receipt.collectives == ()
    assert built.receipt.seconds > 0


def test_ties_dtypes_flags_modes_and_marks_stay():
    model = plain().eval()
    model.blocks[0].up.weight.rate = 0.5
    model.blocks[1].to(torch.bfloat16)
    module = execute(plan_build(create_schedule(model, Mesh())), device="cpu").module
    assert module.head.weight is module.embed.weight
    assert not module.blocks[0].gain.requires_grad
    assert module.blocks[0].up.weight.rate == 0.5
    assert module.blocks[1].up.weight.dtype == torch.bfloat16
    assert not module.training
    assert type(module.blocks[0].up.weight) is nn.Parameter


def test_transient_buffers_stay_transient():
    module = execute(plan_build(schedule("llama")), device="cpu").module
    assert "model.rotary_emb.inv_freq" not in module.state_dict()


def test_a_saved_plan_is_executed_with_a_model_and_finds_its_functions():
    plan = plan_build(schedule("plain").at["blocks.0.norm.weight"].init(fill_with_ones))
    loaded = loads(dumps(plan))
    module = execute(loaded, plain(), device="cpu").module
    other = execute(plan, device="cpu").module
    for (path, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), path


def test_a_plan_with_other_random_numbers_is_refused():
    plan = plan_build(schedule("plain"))
    with pytest.raises(PlanError, match="random"):
        execute(evolve(plan, random_scheme=plan.random_scheme + 1), device="cpu")


def test_a_saved_plan_needs_a_model():
    with pytest.raises(PlanError, match=r"a plan that was loaded carries no model\n      execute\(plan, model\)"):
        execute(loads(dumps(plan_build(schedule("plain")))))


def test_a_function_that_is_gone_is_named(monkeypatch):
    module = types.ModuleType("somewhere")
    exec("def fill(tensor): tensor.copy_(tensor.uniform_().sort().values)", module.__dict__)
    monkeypatch.setitem(sys.modules, "somewhere", module)
    text = dumps(plan_build(schedule("plain").at["blocks.0.norm.weight"].init(module.fill)))
    monkeypatch.delitem(sys.modules, "somewhere")
    with pytest.raises(
        PlanError, match="somewhere:fill: the plan calls this function, and it cannot be imported: No module named"
    ):
        execute(loads(text), plain())


def test_a_function_whose_program_is_known_need_not_be_there(monkeypatch):
    module = types.ModuleType("somewhere")
    exec("def fill(tensor): tensor.fill_(3)", module.__dict__)
    monkeypatch.setitem(sys.modules, "somewhere", module)
    text = dumps(plan_build(schedule("plain").at["blocks.0.norm.weight"].init(module.fill)))
    monkeypatch.delitem(sys.modules, "somewhere")
    assert (execute(loads(text), plain(), device="cpu").module.blocks[0].norm.weight == 3).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: setattr(m.blocks[0], "up", nn.Linear(16, 32, device="meta")),
            r"orig_shape \(32, 16\) instead of \(64, 16\)",
        ),
        (lambda m: m.blocks[0].up.to(torch.bfloat16), "dtype 'bfloat16' instead of 'float32'"),
        (
            lambda m: setattr(m.head, "weight", nn.Parameter(torch.empty(64, 16, device="meta"))),
            r"tie \(\) instead of",
        ),
        (lambda m: m.blocks[0].gain.requires_grad_(True), "requires_grad True instead of False"),
        (lambda m: setattr(m.blocks[0], "up", None), r"blocks.0.up.weight  f32\[64@tensor, 16\]: the plan has this tensor"),
        (
            lambda m: m.register_buffer("more", torch.ones(2)),
            r"more  f32\[2\]: the model has this tensor, and the plan has not",
        ),
        (lambda m: m.blocks[0].up.to_empty(device="cpu"), "the model has values that would be lost"),
    ],
)
def test_another_model_is_refused_with_what_differs(change, text):
    model = plain()
    change(model)
    with pytest.raises(PlanError, match=text):
        execute(plan_build(schedule("plain")), model)


def test_values_that_are_there_are_replaced_where_the_schedule_asks():
    sch = (
        create_schedule(plain("cpu"), Mesh()).at["blocks.0.norm.weight"].init(5.0).at["blocks.1.up.bias"].init(nn.init.ones_)
    )
    plan = plan_build(sch)
    module = execute(plan, device="cpu").module
    assert (module.blocks[0].norm.weight == 5).all()
    assert (module.blocks[1].up.bias == 1).all()
    assert torch.equal(module.embed.weight, plan.runtime.model.embed.weight)
    assert torch.equal(plan.runtime.model.blocks[0].norm.weight, torch.ones(16))


def test_values_that_were_planned_must_be_there():
    plan = plan_build(create_schedule(plain("cpu"), Mesh()))
    with pytest.raises(PlanError, match="its planned source is the module's own values, and it is on meta"):
        execute(plan, plain())


def test_wrong_arguments_are_named():
    plan = plan_build(schedule("plain"))
    with pytest.raises(PlanError, match=r"optimizer: it is a function from parameters to an optimizer, not a list"):
        execute(plan, optimizer=[])
    with pytest.raises(PlanError, match="device: nothing can be held on meta"):
        execute(plan, device="meta")
    with pytest.raises(PlanError, match=r"model: it is a torch\.nn\.Module, not 3"):
        execute(plan, 3)
    with pytest.raises(PlanError, match=r"loss_fn: it is a function from the model's output .* to the loss, not a float"):
        execute(plan, loss_fn=0.5)
    with pytest.raises(PlanError, match=r"loss_fn: it is given, and there is no target to call it"):
        execute(plan, loss_fn=nn.MSELoss())
    with pytest.raises(PlanError, match=r"loss_fn: it is for a pipeline, and this plan has one stage"):
        execute(plan_build(schedule("plain"), target="torch"), loss_fn=nn.MSELoss())


@pytest.mark.parametrize("number", [-1, "ten", None, 0.5])
def test_a_wrong_number_of_checks_is_named(number):
    with pytest.raises(PlanError, match="check_inputs: it is a number of calls, 0 or more, not"):
        execute(plan_build(schedule("plain")), device="cpu", check_inputs=number)


def test_deepspeed_needs_a_process_group_even_for_one_rank():
    config = {"train_batch_size": 1, "gradient_clipping": 1.0}
    with pytest.raises(PlanError, match="the plan is for 1 rank of deepspeed, and there is no process group"):
        execute(plan_build(schedule("plain"), target="deepspeed", config=config))


def test_effects_of_the_caller_replace_the_world():
    plan = plan_build(schedule("llama", Mesh(data=2, tensor=4)))
    for rank in range(8):
        built = execute(plan, effects=DryRun(rank))
        assert built.receipt == predict(plan, rank)
        assert built.module is None


def test_the_device_is_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="shardplan"):
        execute(plan_build(schedule("plain")), device="cpu")
    assert [record.message for record in caplog.records] == ["tensors go to cpu"]


def test_hooks_of_the_user_stay_on_the_copy():
    model = plain()
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    module = execute(plan_build(create_schedule(model, Mesh())), device="cpu").module
    module(torch.zeros(1, 3, dtype=torch.long))
    assert seen == ["Block"]


def test_what_cannot_be_copied_is_named():
    model = plain()
    model.blocks[0].stream = (value for value in ())
    with pytest.raises(PlanError, match=r"blocks.0: its attribute 'stream', a generator, cannot be copied"):
        plan_build(create_schedule(model, Mesh()))


def test_build_and_consolidate_are_plan_and_execute():
    model, optimizer = build(schedule("plain"), seed=3, device="cpu")
    module = consolidate_model(schedule("plain"), seed=3, device="cpu")
    assert optimizer is None
    for (path, a), b in zip(model.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b), path
    ones = consolidate_model(schedule("plain"), param_init_fn=_ones, device="cpu")
    assert all((tensor == 1).all() for tensor in ones.state_dict().values())


def _ones(module):
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.fill_(1)


def test_a_llama_computes_what_transformers_computes_from_the_same_weights():
    module = execute(plan_build(schedule("llama")), device="cpu").module.eval()
    reference = llama("cpu").eval()
    reference.load_state_dict(module.state_dict())
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(module(ids).logits, reference(ids).logits)


def test_a_terminal_shows_a_bar():
    code = (
        "from torch import nn; from shardplan.functional import create_schedule, execute, plan_build;"
        "from shardplan.specs import Mesh;"
        "execute(plan_build(create_schedule(nn.Linear(4, 4, device='meta'), Mesh())), device='cpu')"
    )
    assert "executing the plan" in run_on_terminal([sys.executable, "-c", code])


def test_damage_that_would_be_read_as_something_else_is_refused():
    text = dumps(plan_build(schedule("plain")))
    for one, other in (('"seed": 0', '"seed": 0.4'), ('"tensor": 1', '"tensor": "1"'), ('"seed": 0', '"seed": 0, "sed": 1')):
        with pytest.raises(PlanError, match="it is damaged"):
            loads(text.replace(one, other, 1))


def test_a_row_split_of_one_tensor_sends_views():
    sch = (
        create_schedule(nn.Linear(4096, 4096, bias=False, device="meta"), Mesh(tensor=2)).at[""].colwise(gather_output=True)
    )
    whole = 4 * 4096 * 4096
    assert predict(plan_build(sch, strategy="scatter"), 0).peak_bytes == whole + whole // 2
    assert predict(plan_build(sch), 0).peak_bytes == whole // 2
