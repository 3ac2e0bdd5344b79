"""What transformers models declare, style by style, becomes the verbs that say it; what cannot be split is refused."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

from benchmarks.transformers_coverage import cover_all, table
from shardplan.functional import plan_build
from shardplan.functional.frontends import schedule_from_tp_plan
from shardplan.functional.frontends.transformers_models import model_types
from shardplan.specs import Mesh, PlanError
from shardplan.specs.layout_steps import SetAttributes, SetToLocalSize
from tests.helpers.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers has to say of small configurations

TOKENS = {"input_ids": torch.empty(2, 8, dtype=torch.long, device="meta")}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 130,
    "attn_implementation": "eager",
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 8,
}


def causal(name, **changes):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(config)


class Small(nn.Module):
    """One module of each kind, with a plan that a test gives."""

    def __init__(self, plan):
        super().__init__()
        with torch.device("meta"):
            self.embed = nn.Embedding(12, 8)
            self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
            self.gate_up_proj = nn.Linear(8, 32)
            self.table = nn.Parameter(torch.empty(6, 16, 4))
        self._tp_plan = plan


def said(plan, *paths, num=2):
    """The types of tensors and the changes of modules that a plan leads to."""
    sch = schedule_from_tp_plan(Small(plan), Mesh(tensor=num))
    assert not sch.problems, sch.problems
    types = [str(sch.tree[path]) for path in paths if path in sch.tree]
    return [*types, *(str(step) for step in sch.layout if not isinstance(step, (SetAttributes, SetToLocalSize)))]


def steps(sch, path):
    return [str(step) for step in sch.layout if step.module == path]


def refusal(model, mesh, **inputs):
    with pytest.raises(PlanError) as caught:
        plan_build(schedule_from_tp_plan(model, mesh), init_weights=False, example_inputs=inputs or None)
    return str(caught.value)


PAIR = {"up": "colwise", "down": "rowwise"}
SUM_IN, SUM_OUT = "backward_post all_reduce@tensor", "forward_post all_reduce@tensor"


def test_colwise_and_rowwise():
    found = said(PAIR, "up.weight", "up.bias", "down.weight", "down.bias")
    types = [
        "up.weight  f32[16@tensor, 8]",
        "up.bias  f32[16@tensor]",
        "down.weight  f32[8, 16@tensor]",
        "down.bias  f32[8]",
    ]
    assert found == [*types, SUM_IN, SUM_OUT]


@pytest.mark.parametrize("style", ["colwise_gather_output", "colwise_rep"])
def test_colwise_gather_output(style):
    found = said({"up": style}, "up.weight")
    assert found == ["up.weight  f32[16@tensor, 8]", SUM_IN, "forward_post all_gather(axis=-1)@tensor"]


@pytest.mark.parametrize("style", ["rowwise_split_input", "rowwise_rep"])
def test_rowwise_split_input(style):
    found = said({"down": style}, "down.weight")
    assert found == ["down.weight  f32[8, 16@tensor]", "backward_post all_gather(axis=-1)@tensor", SUM_OUT]


def test_a_rowwise_layer_whose_input_nobody_splits_takes_its_own_features():
    assert said({"down": "rowwise"}) == said({"down": "rowwise_split_input"})


def test_a_colwise_layer_whose_output_nobody_takes_is_gathered():
    assert said({"up": "colwise"}) == said({"up": "colwise_gather_output"})


def test_embedding_rowwise():
    embedded, summed = said({"embed": "embedding_rowwise"}, "embed.weight")[0], said({"embed": "embedding_rowwise"})[-1]
    assert (embedded, summed) == ("embed.weight  f32[12@tensor, 8]", SUM_OUT)


def test_embedding_colwise():
    found = said({"embed": "embedding_colwise"}, "embed.weight")
    assert found == ["embed.weight  f32[12, 8@tensor]", "forward_post all_gather(axis=-1)@tensor"]


def test_vocabularies_that_do_not_divide_are_split_unevenly():
    assert said({"embed": "embedding_rowwise"}, "embed.weight", num=5)[0] == "embed.weight  f32[12@tensor(uneven), 8]"


def test_packed_colwise():
    found = said({"gate_up_proj": "packed_colwise", "down": "rowwise"}, "gate_up_proj.weight", "gate_up_proj.bias")
    assert found[:2] == ["gate_up_proj.weight  f32[16|16@tensor, 8]", "gate_up_proj.bias  f32[16|16@tensor]"]
    assert sorted(found[2:]) == [SUM_IN, SUM_OUT]


def test_packed_tensors():
    assert said({"table": "packed_colwise"}, "table") == ["table  f32[6, 8|8@tensor, 4]"]
    assert said({"table": "packed_rowwise"}, "table") == ["table  f32[6, 16, 2|2@tensor]"]


def test_bare_tensors():
    assert said({"table": "colwise"}, "table") == ["table  f32[6, 16@tensor, 4]"]
    assert said({"table": "rowwise"}, "table") == ["table  f32[6, 16, 4@tensor]"]


def test_sequence_parallel_splits_and_joins_the_sequence():
    found = said({"norm": "sequence_parallel"}, "norm.weight")
    assert found[:3] == [
        "norm.weight  f32[8]",
        "backward_post all_gather(axis=1)@tensor",
        "forward_post all_gather(axis=1)@tensor",
    ]
    assert len(found) == 5  # weight and bias sum their gradients


def test_replicated_with_grad_allreduce():
    sch = schedule_from_tp_plan(Small({"norm": "replicated_with_grad_allreduce"}), Mesh(tensor=2))
    assert [(type(step).__name__, step.name) for step in sch.layout] == [("SumGradient", "weight"), ("SumGradient", "bias")]


def test_all_reduce():
    assert said({"norm": "all_reduce"}) == [SUM_OUT]


def test_moe_identity_expert():
    assert said({"norm": "moe_identity_expert"}) == ["forward_pre divide@tensor"]


@pytest.mark.parametrize("style", ["replicate", "local_params"])
def test_styles_that_change_nothing(style):
    assert said({"embed": style}, "embed.weight") == ["embed.weight  f32[12, 8]"]


def test_an_unknown_style_is_refused_with_its_path():
    message = refusal(Small({"up": "diagonal"}), Mesh(tensor=2))
    assert "up: the style 'diagonal' is unknown\n      The styles of transformers are all_reduce, colwise," in message


def test_a_model_without_a_plan_is_refused():
    message = refusal(nn.Linear(2, 2, device="meta"), Mesh(tensor=2))
    assert "(model): this Linear declares no tensor-parallel plan" in message


def test_rules_that_name_nothing_are_written_to_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        schedule_from_tp_plan(Small({**PAIR, "gone": "colwise"}), Mesh(tensor=2))
    assert "rules of its plan name nothing in this Small: gone: colwise" in caplog.text


def test_a_plan_that_names_no_layer_is_refused_and_one_that_begins_below_the_model_is_found():
    sch = schedule_from_tp_plan(Small({"layers.*.gone": "colwise"}), Mesh(tensor=2))
    assert "none of the 1 rules for layers in its plan, such as 'layers.*.gone', names anything" in str(sch.problems[0])
    model = llama()
    model._tp_plan = {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    sch = schedule_from_tp_plan(model, Mesh(tensor=2))
    assert sch.tree["model.layers.1.mlp.up_proj.weight"].type == "f32[96@tensor, 64]"


def test_a_tensor_that_a_style_cannot_split_is_refused():
    message = refusal(Small({"norm": "colwise", "down": "rowwise"}), Mesh(tensor=2))
    assert "norm: .colwise() is for nn.Linear" in message


def test_one_rank_splits_nothing():
    assert schedule_from_tp_plan(causal("Llama"), Mesh()).layout == ()


def test_key_and_value_heads_are_repeated_on_four_ranks():
    sch = schedule_from_tp_plan(causal("Llama"), Mesh(tensor=4))
    layer = "model.layers.1.self_attn"
    assert sch.tree[f"{layer}.q_proj.weight"].type == "f32[64@tensor, 64]"
    assert sch.tree[f"{layer}.k_proj.weight"].type == "f32[16@tensor(repeated), 64]"
    assert "num_key_value_groups': 2" in steps(sch, layer)[0]  # 4 for each key/value head, 2 of them on each rank
    plan = plan_build(sch, init_weights=False, example_inputs=TOKENS)
    assert plan.tree[f"{layer}.k_proj.weight"].local_shape(Mesh(tensor=4).coordinate(3)) == (8, 64)


def test_heads_that_do_not_divide_are_refused():
    message = refusal(causal("Llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=6), Mesh(tensor=4))
    assert message == (
        "1 problem\n  model.layers.{0..1}.self_attn: its 6 query heads cannot be given to 4 ranks along 'tensor'\n"
        "      Split it over 3 ranks"
    ).replace("1 problem", "2 problems")


def test_uneven_vocabulary_of_a_causal_model():
    sch = schedule_from_tp_plan(causal("Llama"), Mesh(tensor=4))
    assert sch.tree["lm_head.weight"].type == sch.tree["model.embed_tokens.weight"].type == "f32[130@tensor(uneven), 64]"


def test_gpt_neox_keeps_each_heads_queries_keys_and_values_together():
    changes = {"num_attention_heads": 8, "num_key_value_heads": 8}
    sch = schedule_from_tp_plan(causal("GPTNeoX", **changes), Mesh(tensor=2))
    assert sch.tree["gpt_neox.layers.0.attention.query_key_value.weight"].type == "f32[8x24@tensor, 64]"
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_phi_3_gathers_what_is_fused():
    sch = schedule_from_tp_plan(causal("Phi3", pad_token_id=0), Mesh(tensor=2))
    assert "forward_post all_gather(axis=-1)@tensor" in steps(sch, "model.layers.0.self_attn.qkv_proj")
    assert "backward_post all_gather(axis=-1)@tensor" in steps(sch, "model.layers.0.self_attn.o_proj")
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_mixtral_splits_inside_each_expert():
    sch = schedule_from_tp_plan(causal("Mixtral", **MOE), Mesh(tensor=2))
    experts = "model.layers.0.mlp.experts"
    assert sch.tree[f"{experts}.gate_up_proj"].type == "f32[4, 96|96@tensor, 64]"
    assert sch.tree[f"{experts}.down_proj"].type == "f32[4, 64, 96@tensor]"
    found = [(s.when, s.op, s.which) for s in sch.layout if s.module == experts]
    assert found == [
        ("backward_post", "all_reduce", 0),
        ("backward_post", "all_reduce", 1),
        ("forward_post", "all_reduce", 0),
    ]
    assert sch.tree["model.layers.0.mlp.gate.weight"].type == "f32[4, 64]"  # the router works on whole activations
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_mixtral_by_expert_and_inside_each_expert():
    sch = schedule_from_tp_plan(causal("Mixtral", **MOE), Mesh(data=2, expert=2, tensor=2))
    assert sch.tree["model.layers.0.mlp.experts.gate_up_proj"].type == "f32[4@expert, 96|96@tensor, 64]"
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_a_mesh_for_experts_needs_experts():
    assert "the plans of this model name no fused experts" in refusal(causal("Llama"), Mesh(data=2, expert=2))


def test_biases_of_experts_would_be_counted_once_a_rank():
    model = causal("Mixtral", **MOE)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj_bias = nn.Parameter(torch.empty(4, 64, device="meta"))
    message = refusal(model, Mesh(tensor=2))
    assert "model.layers.{0..1}.mlp.experts.down_proj_bias  f32[4, 64]: each rank would add this bias" in message


def test_deepseek_v3_keeps_its_attention_whole():
    sch = schedule_from_tp_plan(causal("DeepseekV3", **MOE, **MLA), Mesh(tensor=2))
    assert not sch.tree["model.layers.0.self_attn.q_b_proj.weight"].shards
    assert sch.tree["model.layers.1.mlp.experts.gate_up_proj"].type == "f32[4, 32|32@tensor, 64]"
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_mla_sums_the_gradient_of_its_rotary_part():
    sch = schedule_from_tp_plan(causal("DeepseekV2", **MOE, **MLA), Mesh(tensor=2))
    (step,) = [s for s in sch.layout if s.module == "model.layers.0.self_attn.kv_a_proj_with_mqa"]
    assert (step.when, step.op, step.features) == ("backward_pre", "all_reduce", (16, 24))
    assert sch.tree["model.layers.0.self_attn.kv_b_proj.weight"].type == "f32[256@tensor, 16]"
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_qwen_3_sums_the_gradients_of_the_norms_of_heads():
    sch = schedule_from_tp_plan(causal("Qwen3"), Mesh(tensor=4))
    assert [type(s).__name__ for s in sch.layout if s.module == "model.layers.0.self_attn.k_norm"] == ["SumGradient"]
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_gemma_2_ties_its_embedding_and_its_head():
    sch = schedule_from_tp_plan(causal("Gemma2"), Mesh(tensor=2))
    assert sch.tree["model.embed_tokens.weight"] is sch.tree["lm_head.weight"]
    assert sch.tree["lm_head.weight"].type == "f32[130@tensor, 64]"
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


def test_norms_over_all_heads_gather_them():
    with torch.device("meta"):
        config = transformers.EsmcConfig(**{**SIZES, "num_key_value_heads": 8})
        sch = schedule_from_tp_plan(transformers.EsmcModel(config), Mesh(tensor=2))
    assert "forward_post all_gather(axis=-1)@tensor" in steps(sch, "layers.0.self_attn.q_proj")
    assert plan_build(sch, init_weights=False, example_inputs=TOKENS)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_of_split_heads_draws_other_numbers_on_each_rank(dropout):
    sch = schedule_from_tp_plan(causal("Llama", attention_dropout=dropout), Mesh(tensor=2))
    assert ("ForkRng" in {type(step).__name__ for step in sch.layout}) == bool(dropout)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_models_that_declare_a_plan():
    outcomes = list(cover_all(model_types(), jobs=2))
    assert len(outcomes) > 190
    assert not [outcome for outcome in outcomes if outcome.lost]
    # whose plan splits the heads to which one of its layers adds whole embeddings
    assert [outcome.model_type for outcome in outcomes if outcome.errors[0]] == ["neomme"]
    refused = [error for outcome in outcomes for error in outcome.errors if error and outcome.model_type != "neomme"]
    assert all("heads cannot be given to" in error for error in refused)
    lost = [outcome.model_type for outcome in outcomes if outcome.unfollowed[0]]
    assert len(lost) <= 5, lost
    assert table(outcomes).count("| holds") > 3 * 180
