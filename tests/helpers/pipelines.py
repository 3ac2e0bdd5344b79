"""Small models of many architectures, where they are cut, and what they are called with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import field, frozen
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from shardplan.functional import create_schedule, plan_build
from shardplan.specs import Mesh

VOCAB = 64
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "use_cache": False}
GPT2_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
OPT_SIZES = {"ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": VOCAB, "decoder_start_token_id": 0}


@frozen
class Architecture:
    """A small model, where it is cut, and what it is called with.

    Args:
        model: Its class.
        config: The class of its config.
        sizes: What the config is made of.
        cuts: Modules after which a stage ends.
        dropouts: Fields of the config that are probabilities of dropping.
        inputs: Arguments of its forward, with the length of each.
        mask: Whether it is called with a mask of padding too.
    """

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    sizes: Mapping[str, object]
    cuts: tuple[str, ...]
    dropouts: tuple[str, ...] = ("attention_dropout",)
    inputs: Mapping[str, int] = field(factory=lambda: {"input_ids": 12})
    mask: bool = False

    def make(self, device="cpu", *, dropout=0.0, **changes):
        """Return the model with every dropout at one probability, with the same values each time."""
        torch.manual_seed(0)
        with torch.device(device):
            return self.model(self.config(**{**self.sizes, **dict.fromkeys(self.dropouts, dropout), **changes}))

    def batch(self, rows=4, longer=0, seed=0):
        """Return the model's arguments: random tokens, the first ones of some rows padding where there is a mask."""
        generator = torch.Generator().manual_seed(seed)
        found = {name: torch.randint(3, VOCAB, (rows, n + longer), generator=generator) for name, n in self.inputs.items()}
        if self.mask:
            found["attention_mask"] = torch.ones_like(found["input_ids"])
            found["attention_mask"][::2, :3] = 0
        return found

    def schedule(self, model, cuts=None):
        """Return the schedule that cuts a model."""
        cuts = self.cuts if cuts is None else cuts
        sch = create_schedule(model, Mesh(pipe=len(cuts) + 1))
        for path in cuts:
            sch = sch.at[path].cut_pipeline_stage()
        return sch

    def plan(self, model, cuts=None):
        """Return the plan that cuts a model."""
        return plan_build(self.schedule(model, cuts), example_inputs=self.batch())


ARCHITECTURES = {
    "llama": Architecture(LlamaForCausalLM, LlamaConfig, GROUPED, ("model.layers.1",)),
    "llama eager": Architecture(
        LlamaForCausalLM,
        LlamaConfig,
        {**GROUPED, "tie_word_embeddings": True, "attn_implementation": "eager"},
        ("model.layers.0", "model.layers.1"),
        mask=True,
    ),
    "gemma 2": Architecture(
        Gemma2ForCausalLM,
        Gemma2Config,
        {**GROUPED, "head_dim": 8, "sliding_window": 6},
        ("model.layers.0", "model.layers.1"),
    ),
    "gpt2": Architecture(
        GPT2LMHeadModel,
        GPT2Config,
        {**SIZES, **GPT2_SIZES, "use_cache": False},
        ("transformer.h.1",),
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ),
    "mixtral": Architecture(MixtralForCausalLM, MixtralConfig, {**GROUPED, "num_local_experts": 4}, ("model.layers.1",)),
    "mixtral eager": Architecture(
        MixtralForCausalLM,
        MixtralConfig,
        {**GROUPED, "num_local_experts": 4, "attn_implementation": "eager"},
        ("model.layers.1",),
    ),
    "bert": Architecture(
        BertForMaskedLM,
        BertConfig,
        SIZES,
        ("bert.encoder.layer.1",),
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        mask=True,
    ),
    "opt": Architecture(
        OPTForCausalLM,
        OPTConfig,
        {**SIZES, **OPT_SIZES, "use_cache": False},
        ("model.decoder.layers.1",),
        ("dropout", "attention_dropout"),
    ),
    "t5": Architecture(
        T5ForConditionalGeneration,
        T5Config,
        {**T5_SIZES, "num_layers": 2, "num_decoder_layers": 2, "use_cache": False},
        ("encoder.block.0", "decoder.block.0"),
        ("dropout_rate",),
        {"input_ids": 12, "decoder_input_ids": 7},
    ),
}


def one_after_another(stages, *inputs):
    """Call stages, each with what the one before gave."""
    for stage in stages:
        inputs = stage(*inputs) if isinstance(inputs, tuple) else stage(inputs)
    return inputs
