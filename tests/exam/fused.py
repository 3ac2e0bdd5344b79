"""Weights that hold several projections: blocks one after another, interleaved groups, and splits that cut across them."""

from __future__ import annotations

from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

from .blocks import HEAD_DIM, HEADS, VOCAB, WIDE, WIDTH, Behind, ids, scheduled, x
from .entry import right, wrong


class _Gated(nn.Module):
    """A feed-forward block whose gate and up projection are one layer: features of both by turns."""

    def __init__(self):
        super().__init__()
        self.fused, self.down = nn.Linear(WIDTH, 2 * WIDE), nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        y = self.fused(x)
        return self.down(functional.silu(y[..., ::2]) * y[..., 1::2])


@right("gate and up of neighbouring features, split without blocks")
def interleaved_gate_up():
    return scheduled(lambda: Behind(_Gated())).at["body.fused"].colwise().at["body.down"].rowwise(), x()


@right("gate and up of neighbouring features, split by blocks and undone alike")
def interleaved_gate_up_by_blocks():
    """Its outputs come in two blocks, and the inputs of the next layer are split by the same blocks."""
    sch = scheduled(lambda: Behind(_Gated())).at["body.fused"].colwise(blocks=(WIDE, WIDE))
    return sch.at["body.down"].rowwise(blocks=(WIDE // 2, WIDE // 2)), x()


@wrong("gate and up of neighbouring features, split by blocks", where="body.down")
def interleaved_gate_up_by_other_blocks():
    sch = scheduled(lambda: Behind(_Gated())).at["body.fused"].colwise(blocks=(WIDE, WIDE))
    return sch.at["body.down"].rowwise(), x()


class _Fused(nn.Module):
    """Attention whose queries, keys and values are one layer; two of its heads share keys and values."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads = HEADS, HEADS // 2
        self.qkv, self.o = nn.Linear(WIDTH, 2 * WIDE), nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


def _fused(*blocks):
    sch = scheduled(lambda: Behind(_Fused())).at["body.qkv"].colwise(blocks=blocks).at["body.o"].rowwise()
    return sch.at["body"].set(num_heads=HEADS // 2, num_kv_heads=HEADS // 4), x()


@wrong("grouped q, k and v fused, split by three equal blocks", where="body")
def grouped_by_equal_blocks():
    return _fused(16, 16, 16)


@wrong("grouped q, k and v fused, keys and values split as one block", where="body")
def keys_and_values_as_one_block():
    return _fused(WIDE, WIDE)


@right("grouped q, k and v fused, split by their own blocks")
def grouped_by_own_blocks():
    return _fused(WIDE, WIDE // 2, WIDE // 2)


def _gpt2():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": VOCAB}
    config = GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    return GPT2LMHeadModel(config)


def _tokens():
    return {"input_ids": ids()["ids"], "use_cache": False}


def _split_gpt2(**split):
    sch = scheduled(_gpt2).at["**.c_attn"].colwise(**split).at["**.attn"].set(num_heads=2, split_size=8)
    return sch.at["**.attn.c_proj"].rowwise().at["**.c_fc"].colwise().at["**.mlp.c_proj"].rowwise(), _tokens()


@wrong("c_attn of a GPT-2 split without blocks", where="transformer.h.0.attn")
def gpt2_without_blocks():
    return _split_gpt2()


@right("c_attn of a GPT-2 split by blocks")
def gpt2_by_blocks():
    return _split_gpt2(blocks=(16, 16, 16))


def _split_neox(**split):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = GPTNeoXConfig(**sizes, vocab_size=VOCAB, hidden_dropout=0.0, attention_dropout=0.0)
    sch = scheduled(lambda: GPTNeoXForCausalLM(config)).at["**.query_key_value"].colwise(**split)
    sch = sch.at["**.attention.dense"].rowwise().at["**.dense_h_to_4h"].colwise().at["**.dense_4h_to_h"].rowwise()
    return sch, _tokens()


@wrong("q, k and v of a GPT-NeoX split by blocks", where="gpt_neox.layers.0.attention")
def neox_by_blocks():
    return _split_neox(blocks=(16, 16, 16))


@right("q, k and v of a GPT-NeoX split by heads")
def neox_by_heads():
    return _split_neox(granule=12)


def _split_phi3(*, gate_up, **qkv):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Phi3Config(**sizes, intermediate_size=24, vocab_size=VOCAB, pad_token_id=0)
    sch = scheduled(lambda: Phi3ForCausalLM(config)).at["**.qkv_proj"].colwise(**qkv)
    sch = sch.at["**.gate_up_proj"].colwise(**gate_up).at["**.{o,down}_proj"].rowwise()
    local = {"config.num_attention_heads": 2, "config.num_key_value_heads": 1}
    return sch.at["**.self_attn"].set(num_key_value_heads=1, **local), _tokens()


@wrong("gate and up of a Phi-3 split without blocks", where="model.layers.0.mlp")
def phi3_without_blocks():
    return _split_phi3(gate_up={}, blocks=(16, 8, 8))


@right("a Phi-3 split by blocks")
def phi3_by_blocks():
    return _split_phi3(gate_up={"blocks": (24, 24)}, blocks=(16, 8, 8))
