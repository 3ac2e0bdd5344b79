"""A shrunk configuration builds a small model of the same structure; how ranks divide its numbers stays as it was."""

from __future__ import annotations

import logging
import re
from math import gcd

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaModel, Qwen2MoeConfig

from shardplan.functional.frontends import shrink_config
from shardplan.functional.frontends.shrink.layers import is_depth
from shardplan.functional.frontends.transformers_models import model_classes, model_types
from shardplan.functional.model.config_fields import read_fields, role_of
from shardplan.functional.model.rng_state import python_state
from shardplan.specs import Mesh, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers has to say of default configurations

SAMPLE = [
    *("afmoe", "albert", "bamba", "bart", "bert", "bloom", "clip", "codegen", "deepseek_v3", "falcon", "falcon_h1"),
    *("gemma2", "gemma3", "gemma3n_text", "gemma4_text", "glm4v", "gpt2", "gpt_neox", "gpt_oss", "granitemoehybrid"),
    *("jamba", "lfm2", "llama", "llama4", "llava", "longcat_flash", "longformer", "mamba2", "minimax", "mixtral"),
    *("modernbert", "olmo2", "opt", "phi3", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_next", "qwen3_vl_moe", "t5"),
    *("t5gemma", "vit", "whisper"),
]
MOST_PARAMS = 1_000_000  # times the ranks


def configuration(model_type):
    return CONFIG_MAPPING[model_type]()


def model_of(config):
    for cls in model_classes(config):
        try:
            with torch.device("meta"):
                return cls(config)
        except Exception:
            continue
    return None


def fields_of(config):
    return {str(field): field for field in read_fields(config)}


def kinds_of_tensors(model):
    """The names and ties of all tensors, without the numbers of layers."""
    names = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    tied = len(names) - len([*model.parameters(), *model.buffers()])
    return {re.sub(r"\d+", "*", name) for name in names}, tied > 0


def num_layers(model):
    return max(len(m) for m in model.modules() if isinstance(m, nn.ModuleList))


@pytest.mark.parametrize("num", [2, 4, 8])
@pytest.mark.parametrize("model_type", SAMPLE)
def test_laws(model_type, num):
    config = configuration(model_type)
    before = config.to_json_string(use_diff=False)
    small = shrink_config(config, Mesh(tensor=num))
    assert config.to_json_string(use_diff=False) == before
    model = model_of(small)
    assert sum(parameter.numel() for parameter in model.parameters()) < MOST_PARAMS * num
    assert kinds_of_tensors(model) == kinds_of_tensors(model_of(config))
    assert num_layers(model) <= 16
    check_numbers(fields_of(config), fields_of(small), num)


def check_numbers(large, small, num):
    assert large.keys() <= small.keys()
    for path, field in large.items():
        old, new = field.number, small[path].number
        assert new <= max(old, 2) or path.endswith(("_id", "_index")), path
        if role_of(field) in {"head", "expert", "vocabulary"}:
            assert gcd(old, num) == gcd(new, num), f"{path}: {old} of {num} ranks became {new}"
        if role_of(field) == "vocabulary":
            assert (old % 2, old > 1) == (new % 2, new > 1), path
        if role_of(field) == "width" and old != new and not is_depth(field):
            assert old % num or not new % num, f"{path}: {num} ranks divide {old} and not {new}"
    for one, other in pairs(large, "head"):
        assert (one.number < other.number) == (small[str(one)].number < small[str(other)].number)
        if one.number and other.number % one.number == 0:
            assert small[str(other)].number % small[str(one)].number == 0


def pairs(fields, role):
    chosen = [field for field in fields.values() if role_of(field) == role and field.number]
    return [(one, other) for one in chosen for other in chosen if one.config == other.config]


def test_the_same_configuration_twice_and_no_global_generator_moves():
    before = torch.get_rng_state(), python_state()
    made = [shrink_config(configuration("deepseek_v3"), Mesh(tensor=2)).to_json_string() for _ in range(2)]
    assert made[0] == made[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == python_state()


@pytest.mark.parametrize(
    ("heads", "key_value", "num", "expected"),
    [
        (32, 32, 2, (2, 2)),
        (32, 8, 2, (4, 2)),
        (32, 8, 4, (8, 4)),
        (32, 8, 8, (16, 8)),
        (32, 8, 16, (16, 8)),  # two ranks share a key head
        (32, 2, 4, (4, 2)),
        (32, 1, 4, (4, 1)),
        (28, 4, 8, (12, 4)),  # 8 ranks divide neither
        (12, 12, 8, (4, 4)),
        (15, 5, 2, (9, 3)),  # odd numbers stay odd
    ],
)
def test_heads(heads, key_value, num, expected):
    for width in (heads * 128, heads * 96):
        config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=key_value, head_dim=128, hidden_size=width)
        small = shrink_config(config, Mesh(tensor=num))
        assert (small.num_attention_heads, small.num_key_value_heads) == expected
        assert (small.hidden_size == small.num_attention_heads * small.head_dim) == (width == heads * 128)


def test_experts_groups_and_latent_sizes():
    config = configuration("deepseek_v3")
    small = shrink_config(config, Mesh(tensor=2))
    assert (small.n_routed_experts, small.n_group, small.topk_group, small.num_experts_per_tok) == (8, 2, 1, 2)
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim
    assert small.qk_nope_head_dim == small.v_head_dim == 2 * small.qk_rope_head_dim
    assert len({small.q_lora_rank, small.kv_lora_rank, small.hidden_size, small.moe_intermediate_size}) == 4
    assert (small.first_k_dense_replace, small.num_hidden_layers) == (2, 4)  # two dense layers, two sparse ones
    assert shrink_config(config, Mesh(data=16, expert=16)).n_routed_experts == 16


@pytest.mark.parametrize(
    ("model_type", "of_layers"),
    [
        ("gemma3_text", ["sliding_attention"] * 2 + ["full_attention"] * 2),
        ("qwen3_next", ["linear_attention"] * 2 + ["full_attention"] * 2),
        ("llama", None),
    ],
)
def test_two_layers_of_each_kind(model_type, of_layers):
    small = shrink_config(configuration(model_type), Mesh(tensor=2))
    assert getattr(small, "layer_types", None) == of_layers
    assert small.num_hidden_layers == len(of_layers or "12")


def test_layers_that_are_counted_by_periods_are_kept_from_the_start():
    small = shrink_config(configuration("jamba"), Mesh(tensor=2))
    kinds = [type(layer).__name__ + type(layer.feed_forward).__name__ for layer in model_of(small).model.layers]
    assert len(kinds) == 13  # of every eight layers, the fifth is an attention
    assert min(map(kinds.count, kinds)) == 2


def test_layers_that_share_keys_follow_layers_that_make_them():
    small = shrink_config(configuration("gemma3n_text"), Mesh(tensor=2))
    first = small.layer_types[: -small.num_kv_shared_layers]
    assert set(small.layer_types[-small.num_kv_shared_layers :]) == {"sliding_attention", "full_attention"} == set(first)
    assert len(small.intermediate_size) == len(small.activation_sparsity_pattern) == small.num_hidden_layers


def test_dense_layers_in_a_list():
    config = Qwen2MoeConfig(mlp_only_layers=[0, 5], num_hidden_layers=12)
    small = shrink_config(config, Mesh(tensor=2))
    assert (small.mlp_only_layers, small.num_hidden_layers) == ([0, 3], 4)


def test_special_tokens_lie_below_the_vocabulary_and_stay_different():
    small = shrink_config(configuration("qwen2_vl"), Mesh(tensor=2))
    ids = [small.image_token_id, small.video_token_id, small.vision_start_token_id, small.vision_end_token_id]
    assert len(set(ids)) == 4
    assert max(ids) < small.text_config.vocab_size


def test_what_does_not_run_small_stays_and_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        small = shrink_config(configuration("neomme"), Mesh(tensor=2))
    assert small.head_dim == configuration("neomme").head_dim
    assert "keep their values, as with smaller ones the model does not run: head_dim" in caplog.text


def test_a_configuration_that_builds_no_model_is_an_error():
    with pytest.raises(PlanError, match=r"AutoformerConfig: it builds no model: AutoformerModel raises ValueError"):
        shrink_config(configuration("autoformer"), Mesh(tensor=2))


def test_layers_that_cannot_be_left_out_are_an_error(monkeypatch):
    def with_a_norm(self, config):
        init(self, config)
        self.more = nn.Linear(8, 8, bias=config.num_hidden_layers > 6)

    init = LlamaModel.__init__
    monkeypatch.setattr(LlamaModel, "__init__", with_a_norm)
    with pytest.raises(PlanError, match=r"LlamaConfig: with num_hidden_layers 2 model.more.bias are in one of the"):
        shrink_config(LlamaConfig(num_hidden_layers=12), Mesh(tensor=2))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_all_types_that_declare_a_plan():
    for model_type in model_types():
        try:
            large = model_of(configuration(model_type))
        except Exception:
            continue
        if getattr(large, "_tp_plan", None):
            small = model_of(shrink_config(configuration(model_type), Mesh(tensor=2)))
            assert sum(parameter.numel() for parameter in small.parameters()) < 2 * MOST_PARAMS, model_type
            assert kinds_of_tensors(small) == kinds_of_tensors(large), model_type
