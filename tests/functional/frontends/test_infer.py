"""Schedules told from what a model computes: exact splits, attributes, and what stays whole."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from shardplan.functional import plan_build
from shardplan.functional.frontends.graph.factors import Factor, count, laid_out, part, representative, reshape, unify
from shardplan.functional.frontends.graph.inputs import inferred_inputs
from shardplan.functional.frontends.graph.schedule import infer_schedule
from shardplan.specs import Mesh
from shardplan.specs.errors import PlanError
from shardplan.specs.layout_steps import ForkRng, SetAttributes

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(**changes):
    return BertForMaskedLM(BertConfig(**{**COMMON, "intermediate_size": 64, "vocab_size": 96, **changes}))


def gpt2(**changes):
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, **ids, **changes}))


def opt():
    return OPTForCausalLM(OPTConfig(**COMMON, ffn_dim=64, vocab_size=96, word_embed_proj_dim=32))


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return T5ForConditionalGeneration(T5Config(**sizes))


def vit():
    return ViTForImageClassification(ViTConfig(**COMMON, intermediate_size=64, image_size=32, patch_size=8))


ATTENTION = ["f32[32@tensor, 32]", "f32[32@tensor]"]
SPLITS = {
    bert: {
        "bert.encoder.layer.*.attention.self.{query,key,value}.{weight,bias}": ATTENTION,
        "bert.encoder.layer.*.attention.output.dense.{weight,bias}": ["f32[32, 32@tensor]", "f32[32]"],
        "bert.encoder.layer.*.intermediate.dense.{weight,bias}": ["f32[64@tensor, 32]", "f32[64@tensor]"],
        "bert.encoder.layer.*.output.dense.{weight,bias}": ["f32[32, 64@tensor]", "f32[32]"],
        "bert.embeddings.word_embeddings.weight": ["f32[96@tensor, 32]"],
        "bert.embeddings.position_embeddings.weight": ["f32[512, 32]"],
        "cls.predictions.bias": ["f32[96@tensor]"],
        "cls.predictions.transform.dense.weight": ["f32[32, 32]"],
        "**.LayerNorm.weight": ["f32[32]"],
    },
    gpt2: {
        "transformer.h.*.attn.c_attn.{weight,bias}": ["f32[32, 32|32|32@tensor]", "f32[32|32|32@tensor]"],
        "transformer.h.*.attn.c_proj.{weight,bias}": ["f32[32@tensor, 32]", "f32[32]"],
        "transformer.h.*.mlp.c_fc.{weight,bias}": ["f32[32, 128@tensor]", "f32[128@tensor]"],
        "transformer.h.*.mlp.c_proj.{weight,bias}": ["f32[128@tensor, 32]", "f32[32]"],
        "transformer.wte.weight": ["f32[96@tensor, 32]"],
        "transformer.wpe.weight": ["f32[1024, 32]"],
        "transformer.**.{ln_1,ln_2,ln_f}.weight": ["f32[32]"],
    },
    opt: {
        "model.decoder.layers.*.self_attn.[qkv]_proj.{weight,bias}": ATTENTION,
        "model.decoder.layers.*.self_attn.out_proj.{weight,bias}": ["f32[32, 32@tensor]", "f32[32]"],
        "model.decoder.layers.*.fc1.{weight,bias}": ["f32[64@tensor, 32]", "f32[64@tensor]"],
        "model.decoder.layers.*.fc2.{weight,bias}": ["f32[32, 64@tensor]", "f32[32]"],
        "model.decoder.embed_tokens.weight": ["f32[96@tensor, 32]"],
        "**.{self_attn_layer_norm,final_layer_norm}.bias": ["f32[32]"],
    },
    t5: {
        "*.block.*.layer.*.{Self,EncDec}Attention.[qkv].weight": ["f32[64@tensor, 32]"],
        "*.block.*.layer.*.{Self,EncDec}Attention.o.weight": ["f32[32, 64@tensor]"],
        "*.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ["f32[32, 4@tensor]"],
        "*.block.*.layer.*.DenseReluDense.wi.weight": ["f32[48@tensor, 32]"],
        "*.block.*.layer.*.DenseReluDense.wo.weight": ["f32[32, 48@tensor]"],
        "shared.weight": ["f32[96@tensor, 32]"],
        "**.{layer_norm,final_layer_norm}.weight": ["f32[32]"],
    },
    vit: {
        "vit.layers.*.attention.[qkv]_proj.{weight,bias}": ATTENTION,
        "vit.layers.*.attention.o_proj.{weight,bias}": ["f32[32, 32@tensor]", "f32[32]"],
        "vit.layers.*.mlp.fc1.{weight,bias}": ["f32[64@tensor, 32]", "f32[64@tensor]"],
        "vit.layers.*.mlp.fc2.{weight,bias}": ["f32[32, 64@tensor]", "f32[32]"],
        "vit.embeddings.**": ["f32[1, 1, 32]", "f32[1, 17, 32]", "f32[32, 3, 8, 8]", "f32[32]"],
        "classifier.{weight,bias}": ["f32[2, 32]", "f32[2]"],
    },
}
ATTRIBUTES = {
    bert: {"bert.encoder.layer.1.attention.self": {"num_attention_heads": 1}},
    gpt2: {"transformer.h.1.attn": {"num_heads": 1, "split_size": 8}},
    opt: {"model.decoder.layers.1.self_attn": {"num_heads": 1}},
    t5: {
        "encoder.block.1.layer.0.SelfAttention": {"n_heads": 1},
        "decoder.block.1.layer.1.EncDecAttention": {"n_heads": 1},
    },
    vit: {"vit.layers.1.attention": {"num_attention_heads": 1}},
}


def on_meta(make, **changes):
    with torch.device("meta"):
        return make(**changes)


def tensors(inputs):
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def attributes(sch, path):
    """What is set on a module, besides the sizes of linear modules and embeddings."""
    steps = [step for step in sch.layout if isinstance(step, SetAttributes) and step.module == path]
    return {name: value for step in steps for name, value in step.values.items()}


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("make", list(SPLITS), ids=lambda make: make.__name__)
def test_splits_of_known_models(make, num):
    model = on_meta(make)
    sch = infer_schedule(model, Mesh(tensor=num))
    for pattern, types in SPLITS[make].items():
        found = sch.tree.select(pattern)
        assert found, pattern
        assert {spec.type for spec in found} == set(types), pattern
    for path, values in ATTRIBUTES[make].items():
        assert attributes(sch, path) == {name: value * 4 // num for name, value in values.items()}
    assert all(spec.tags["why"] for spec in sch.tree.values())
    plan_build(sch, example_inputs=tensors(inferred_inputs(model)))


def test_why_says_what_a_tensor_is_split_by_and_why_others_are_whole():
    tree = infer_schedule(on_meta(bert), Mesh(tensor=2)).tree
    layer = "bert.encoder.layer.0"
    column = "its outputs are 4 heads of 8, which nothing mixes before dense sums over them"
    assert tree[f"{layer}.attention.self.query.bias"].tags["why"] == column
    row = "it sums over the 4 heads that query, key, value gives; the ranks' sums are added up"
    assert tree[f"{layer}.attention.output.dense.weight"].tags["why"] == row
    assert tree[f"{layer}.output.dense.bias"].tags["why"] == "whole: it is added once, after the ranks' sums are added up"
    assert "a norm is taken over them" in tree[f"{layer}.output.LayerNorm.weight"].tags["why"]
    assert "positions" in tree["bert.embeddings.position_embeddings.weight"].tags["why"]


def test_heads_that_do_not_divide_stay_whole():
    sch = infer_schedule(on_meta(bert, hidden_size=24, num_attention_heads=3), Mesh(tensor=2))
    for name in ("self.query.weight", "self.value.bias", "output.dense.weight"):
        spec = sch.tree[f"bert.encoder.layer.0.attention.{name}"]
        assert not spec.shards
        assert spec.tags["why"] == "whole: there are 3 of what would be split, and 2 ranks do not divide them"
    assert sch.tree["bert.encoder.layer.0.intermediate.dense.weight"].type == "f32[64@tensor, 24]"


def test_a_vocabulary_that_does_not_divide_stays_whole_with_its_head():
    tree = infer_schedule(on_meta(gpt2, vocab_size=97), Mesh(tensor=2)).tree
    assert tree["lm_head.weight"].type == "f32[97, 32]"
    assert "97 rows, which 2 ranks do not divide" in tree["lm_head.weight"].tags["why"]


def test_dropout_on_parts_differs_from_rank_to_rank():
    sch = infer_schedule(on_meta(t5), Mesh(tensor=2))
    forked = {step.module for step in sch.layout if isinstance(step, ForkRng)}
    assert "encoder.block.0.layer.1.DenseReluDense.dropout" in forked
    assert "encoder.block.0.layer.0.SelfAttention" in forked
    assert not forked & {"encoder.dropout", "encoder.block.0.layer.0.dropout"}


class Renorm(nn.Module):
    """An operator that the rules do not know."""

    def forward(self, x):
        return torch.renorm(x, 2, 0, 1.0)


class Between(nn.Module):
    """Two linear modules with something between."""

    def __init__(self, between):
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.between = between
        self.down = nn.Linear(32, 8)

    def forward(self, x):
        return x + self.down(self.between(self.up(x)))


class Gated(nn.Module):
    """A fused gate and up, and down."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(8, 64)
        self.down = nn.Linear(32, 8)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class Attention(nn.Module):
    """Attention written out, with a joint projection of one kind or another."""

    def __init__(self, kind, heads=4):
        super().__init__()
        self.kind, self.heads, self.width = kind, heads, 32 // heads
        self.joint = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.slopes = nn.Parameter(torch.zeros(heads))

    def reset_parameters(self):
        nn.init.ones_(self.slopes)

    def forward(self, x):
        b, s, _ = x.shape
        if self.kind == "blocks":
            q, k, v = self.joint(x).view(b, s, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.joint(x).view(b, s, self.heads, 3 * self.width).transpose(1, 2).chunk(3, dim=-1)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) if self.kind == "einsum" else q @ k.transpose(-1, -2)
        scores = scores / math.sqrt(self.width) + self.slopes[:, None, None]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1))


def split(model, num=2, width=8):
    with torch.device("meta"):
        model = model()
    inputs = {"x": torch.zeros(2, 3, width, device="meta")}
    sch = infer_schedule(model, Mesh(tensor=num), example_inputs=inputs)
    plan_build(sch, example_inputs=inputs)
    return sch, {spec.path: spec.type for spec in sch.tree.values()}


def test_an_mlp_is_split():
    _, types = split(lambda: Between(nn.GELU()))
    assert types == {"up.weight": "f32[32@tensor, 8]", "up.bias": "f32[32@tensor]", "down.weight": "f32[8, 32@tensor]",
                     "down.bias": "f32[8]"}  # fmt: skip


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda: nn.LayerNorm(32), "a norm is taken over them"),
        (lambda: nn.Softmax(-1), "softmax is taken over them"),
        (lambda: nn.Conv1d(3, 3, 3, padding=1), "windows of places are taken"),
        (Renorm, "renorm works on them"),
    ],
)
def test_what_is_mixed_between_stays_whole(between, reason):
    sch, types = split(lambda: Between(between()))
    assert not any("@" in type_ for type_ in types.values())
    assert reason in sch.tree["up.weight"].tags["why"]


def test_a_gate_in_one_tensor_is_split_block_by_block():
    _, types = split(Gated)
    assert types["both.weight"] == "f32[32|32@tensor, 8]"


@pytest.mark.parametrize(
    ("kind", "joint"),
    [
        ("blocks", "f32[32|32|32@tensor, 32]"),
        ("interleaved", "f32[96@tensor, 32]"),
        ("einsum", "f32[96@tensor, 32]"),
    ],
)
def test_attention_written_out_is_split_by_heads_with_what_belongs_to_them(kind, joint):
    sch, types = split(lambda: Attention(kind), width=32)
    assert types["joint.weight"] == joint
    assert types["slopes"] == "f32[4@tensor]"
    assert types["out.weight"] == "f32[32, 32@tensor]"
    assert attributes(sch, "") == {"heads": 2}


class SizeInNumbers(nn.Module):
    """An MLP whose code computes with the size that it would have to be told."""

    def __init__(self):
        super().__init__()
        self.num = 4
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        parts = self.up(x).view(*x.shape[:-1], self.num, 8)
        return self.down((parts / self.num).flatten(-2))


def test_a_size_that_is_also_a_number_in_the_computation_leaves_all_whole():
    sch, types = split(SizeInNumbers)
    assert not any("@" in type_ for type_ in types.values())
    assert "no local sizes were found" in sch.tree["up.weight"].tags["why"]


class Rolled(nn.Module):
    """An MLP that moves positions by as many as it has heads, so that a rank with fewer heads would move them less far."""

    def __init__(self):
        super().__init__()
        self.num = 4
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        heads = self.up(x).view(*x.shape[:-1], self.num, 8)
        return x + self.down(heads.roll(self.num, 1).flatten(-2))


def test_what_the_types_of_activations_refuse_stays_whole():
    with torch.device("meta"):
        model = nn.Sequential(Rolled(), Rolled(), Between(nn.GELU()))
    inputs = {"input": torch.zeros(2, 3, 8, device="meta")}
    sch = infer_schedule(model, Mesh(tensor=2), example_inputs=inputs)
    assert {spec.module for spec in sch.tree.values() if spec.shards} == {"2.up", "2.down"}
    why = sch.tree["1.up.weight"].tags["why"]
    assert why.startswith("whole: split, it would not compute what the whole model does: 0: roll computes with 2 where")
    assert plan_build(sch, example_inputs=inputs).equality.answer == "holds"


def test_inputs_that_cannot_be_told_are_asked_for():
    with pytest.raises(PlanError, match="cannot be told from its configuration"):
        infer_schedule(on_meta(Gated), Mesh(tensor=2))


def test_one_rank_leaves_all_whole():
    with torch.device("meta"):
        sch = infer_schedule(Gated(), Mesh(), example_inputs={"x": torch.zeros(2, 8)})
    assert not any(spec.shards for spec in sch.tree.values())


def test_what_one_operator_shows_of_an_axis_holds_where_it_was_met_before():
    features, other = (Factor(24),), (Factor(24),)
    unify(features, other)
    heads, _ = reshape([features], (4, 6))
    assert count(other, representative(heads[0])) == 1
    joint = laid_out([features, (Factor(24),)])
    assert count(joint, representative(heads[0])) == -1
    assert count(part(joint, 0, 24), representative(heads[0])) == 1
