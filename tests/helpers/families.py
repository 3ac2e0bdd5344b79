"""Small models of many families, each with the schedule that its frontend gives."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from shardplan.functional.frontends import infer_schedule, schedule_from_tp_plan

VOCAB, LENGTH, BATCH = 64, 8, 4

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _gpt2():
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCAB, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def _deepseek():
    config = DeepseekV3Config(
        **{**_SMALL, "num_key_value_heads": 8},
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config)


def _t5():
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def _opt():
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
        dropout=0.0,
    )
    return OPTForCausalLM(config)


def _vit():
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=6,
        **_NO_DROPOUT,
    )
    return ViTForImageClassification(config)


MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**_SMALL, "num_key_value_heads": 2})),
    "gpt2": _gpt2,
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SMALL)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_SMALL,
            moe_intermediate_size=40,  # on 4 ranks rows of 10 numbers, which a grouped matrix product does not take
            shared_expert_intermediate_size=30,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SMALL, head_dim=8, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SMALL, head_dim=8)),
    "bert": lambda: BertForMaskedLM(
        BertConfig(**{**_SMALL, **_NO_DROPOUT, "num_attention_heads": 4, "max_position_embeddings": 32})
    ),
    "t5": _t5,
    "deepseek_v3": _deepseek,
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{name: value for name, value in _SMALL.items() if name != "num_key_value_heads"})
    ),
    "opt": _opt,
    "vit": _vit,
}

INFERRED = ("gpt2", "bert", "t5", "opt", "vit")
"""What declares nothing: its schedule is read off what it computes."""


def family(name):
    with torch.device("meta"):
        return MAKERS[name]()


def schedule_of(name, mesh):
    return (infer_schedule if name in INFERRED else schedule_from_tp_plan)(family(name), mesh)


def inputs(name, step):
    """What a model is called with in one step, and the targets of its outputs."""
    generator = torch.Generator().manual_seed(step)
    if name == "vit":
        labels = torch.arange(BATCH) % 6
        pixels = torch.randn(BATCH, 3, 8, 8, generator=generator) + labels[:, None, None, None]
        return {"pixel_values": pixels}, labels
    ids = (torch.randint(VOCAB, (BATCH, 1), generator=generator) + torch.arange(LENGTH)) % VOCAB
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids}, (ids + 1) % VOCAB
    return {"input_ids": ids}, (ids + 1) % VOCAB
