"""Weights that hold several projections: blocks one after another, interleaved groups, and splits that cut across them."""

from __future__ import annotations

from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

from .blocks import HEAD_DIM, HEADS, VOCAB, WIDE, WIDTH, Behind, ids, mlp, scheduled, x
from .entry import right, wrong


class _Gated(nn.Module):
    """A feed-forward block whose gate and up projection are one layer.

    Args:
        join: Returns the product of gate and up projection from the output of the fused layer.
    """

    def __init__(self, join):
        super().__init__()
        self.fused, self.down, self.join = nn.Linear(WIDTH, 2 * WIDE), nn.Linear(WIDE, WIDTH), join

    def forward(self, x):
        return self.down(self.join(self.fused(x)))


def _gated(join, **split):
    sch = scheduled(lambda: Behind(_Gated(join)))
    return sch.at["body.fused"].colwise(**split).at["body.down"].rowwise(), x()


def _swiglu(y):
    gate, up = y.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _swiglu_of_neighbours(y):
    return functional.silu(y[..., ::2]) * y[..., 1::2]


@wrong("gate and up fused, split without blocks", where="body")
def gate_up_without_blocks():
    return _gated(_swiglu)


@right("gate and up fused, split by blocks")
def gate_up_by_blocks():
    return _gated(_swiglu, blocks=(WIDE, WIDE))


@right("gate and up of neighbouring features, split without blocks")
def interleaved_gate_up():
    return _gated(_swiglu_of_neighbours)


@right("gate and up of neighbouring features, split by blocks and undone alike")
def interleaved_gate_up_by_blocks():
    """Its outputs come in two blocks, and the inputs of the next layer are split by the same blocks."""
    sch = scheduled(lambda: Behind(_Gated(_swiglu_of_neighbours)))
    sch = sch.at["body.fused"].colwise(blocks=(WIDE, WIDE))
    return sch.at["body.down"].rowwise(blocks=(WIDE // 2, WIDE // 2)), x()


@wrong("gate and up of neighbouring features, split by blocks", where="body.down")
def interleaved_gate_up_by_other_blocks():
    return _gated(_swiglu_of_neighbours, blocks=(WIDE, WIDE))


@wrong("row split by blocks behind a column split without", where="body.2")
def rows_by_other_blocks():
    sch = scheduled(lambda: Behind(mlp()))
    return sch.at["body.0"].colwise().at["body.2"].rowwise(blocks=(WIDE // 2, WIDE // 2)), x()


class _Fused(nn.Module):
    """Attention whose queries, keys and values are one layer.

    Args:
        is_by_head: Whether queries, keys and values of each head stand together, and not those of all heads.
        num_kv_heads: Number of heads of keys, and of values.
    """

    def __init__(self, *, is_by_head=False, num_kv_heads=HEADS):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.is_by_head = HEADS, num_kv_heads, is_by_head
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * num_kv_heads) * HEAD_DIM)
        self.o = nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        y = self.qkv(x)
        if self.is_by_head:
            q, k, v = y.unflatten(-1, (-1, 3 * HEAD_DIM)).chunk(3, dim=-1)
        else:
            nums = self.num_heads, self.num_kv_heads, self.num_kv_heads
            q, k, v = y.unflatten(-1, (-1, HEAD_DIM)).split(nums, dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads
        )
        return self.o(out.transpose(1, 2).flatten(2))


def _fused(num_kv_heads=HEADS, *, is_by_head=False, **split):
    sch = scheduled(lambda: Behind(_Fused(is_by_head=is_by_head, num_kv_heads=num_kv_heads)))
    sch = sch.at["body.qkv"].colwise(**split).at["body.o"].rowwise()
    return sch.at["body"].set(num_heads=HEADS // 2, num_kv_heads=num_kv_heads // 2), x()


@wrong("q, k and v fused, split without blocks", where="body")
def qkv_without_blocks():
    return _fused()


@right("q, k and v fused, split by blocks")
def qkv_by_blocks():
    return _fused(blocks=(WIDE,) * 3)


@wrong("q, k and v of each head together, split by blocks", where="body")
def heads_by_blocks():
    return _fused(is_by_head=True, blocks=(WIDE,) * 3)


@right("q, k and v of each head together, split without blocks")
def heads_without_blocks():
    return _fused(is_by_head=True, granule=3 * HEAD_DIM)


@wrong("grouped q, k and v fused, split by three equal blocks", where="body")
def grouped_by_equal_blocks():
    return _fused(num_kv_heads=2, blocks=(16, 16, 16))


@right("grouped q, k and v fused, split by their own blocks")
def grouped_by_own_blocks():
    return _fused(num_kv_heads=2, blocks=(WIDE, WIDE // 2, WIDE // 2), granule=HEAD_DIM)


@wrong("keys and values fused with queries, as one block", where="body")
def keys_and_values_as_one_block():
    return _fused(num_kv_heads=2, blocks=(WIDE, WIDE))


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
