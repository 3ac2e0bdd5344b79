"""Adapters of peft follow the layers that they are on, as a model's plan declares these: proven, and right by ``verify``."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from shardplan.functional import execute, plan_build, verify
from shardplan.functional.frontends import schedule_from_tp_plan
from shardplan.specs import Mesh, PlanError
from tests.helpers.ranks import results, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # what peft has to say of models without values

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(**given):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES, **given))


def qwen3_moe():
    experts = {"moe_intermediate_size": 32, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))


def lora(*modules, **given):
    return LoraConfig(r=RANK, target_modules=list(modules), **given)


RANK = 6
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTED = {
    "LoRA": lambda: get_peft_model(llama(), lora(*ATTENTION, "up_proj", "down_proj", lora_dropout=0.1)),
    "rsLoRA on all linear layers": lambda: get_peft_model(llama(), LoraConfig(target_modules="all-linear", use_rslora=True)),
    "LoRA on embeddings": lambda: get_peft_model(llama(), lora("embed_tokens", "q_proj")),
    "a head trained whole": lambda: get_peft_model(llama(), lora("q_proj", modules_to_save=["lm_head"])),
    "a tied head trained whole": lambda: get_peft_model(
        llama(tie_word_embeddings=True), lora("q_proj", modules_to_save=["lm_head"])
    ),
    "DoRA of column-split layers": lambda: get_peft_model(llama(), lora("q_proj", "up_proj", use_dora=True)),
    "IA3": lambda: get_peft_model(
        llama(), IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "LoRA put into the model itself": lambda: inject_adapter_in_model(lora("q_proj", "o_proj"), llama()),
    "LoRA on a mixture of experts": lambda: get_peft_model(qwen3_moe(), lora(*ATTENTION)),
}
INPUTS = {"input_ids": torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0)), "use_cache": False}


def adapted(name):
    with torch.device("meta"):
        return ADAPTED[name]()


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_follow_their_layers(name):
    sch = schedule_from_tp_plan(adapted(name), Mesh(tensor=2))
    plan = plan_build(sch, example_inputs=INPUTS, init_weights=False)
    assert plan.equality.answer == "holds", plan.equality.unfollowed
    found = verify(sch, INPUTS)
    assert found.ok, found
    split = [spec for spec in plan.tree.values() if ".lora_" in spec.path and spec.shards]
    assert all(spec.orig_shape[spec.shards[0].axis] != RANK for spec in split)


def test_prompts_are_put_before_a_split_model():
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    sch = schedule_from_tp_plan(model, Mesh(tensor=2))
    assert plan_build(sch, example_inputs=INPUTS, init_weights=False).equality.answer == "holds"
    assert verify(sch, INPUTS).ok


def test_an_adapter_that_is_not_active_is_split_and_said_not_to_be_followed():
    model = get_peft_model(llama(), lora("q_proj", "o_proj"))
    model.add_adapter("other", lora("q_proj", "down_proj"))
    model.set_adapter("other")
    sch = schedule_from_tp_plan(model, Mesh(tensor=2))
    plan = plan_build(sch, example_inputs=INPUTS, init_weights=False)
    lost = {unfollowed.path.rpartition(".")[2] for unfollowed in plan.equality.unfollowed}
    assert lost == {"default"}
    assert verify(sch, INPUTS).ok


def test_dora_over_split_inputs_is_refused_by_name():
    with torch.device("meta"):
        model = get_peft_model(llama(), lora("o_proj", use_dora=True))
    with pytest.raises(PlanError, match="DoRA takes norms of its weight over all of them"):
        plan_build(schedule_from_tp_plan(model, Mesh(tensor=2)))


def values(tensor):
    tensor.normal_(std=0.2)


def trained(_, mesh):
    sch = schedule_from_tp_plan(adapted("rsLoRA on all linear layers"), mesh)
    sch = sch.at["**"].init(values)
    plan = plan_build(sch)
    built = execute(plan, device="cpu", progress=False, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    losses = []
    for step in range(20):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = built.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append((loss.item(), built.clip_grad_norm_(0.5).item()))
        built.optimizer.step()
        built.optimizer.zero_grad()
    return losses, {path: tensor for path, tensor in built.state_dict().items() if "lora_" in path}


def test_adapters_train_on_ranks_as_in_one_process():
    expected, weights = trained(0, Mesh())
    (losses, found), (others, _) = results(run_ranks(trained, 2, Mesh(tensor=2)))
    assert losses == others
    assert losses == [pytest.approx(step, rel=1e-3) for step in expected]
    assert found.keys() == weights.keys()
    assert all(torch.allclose(found[path], weights[path], atol=1e-4) for path in weights)
