"""Activations split along tokens between layers that are split by features."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from .blocks import VOCAB, WIDE, WIDTH, Do, ids, scheduled, x
from .entry import right, wrong

TOKENS = 6


class _Sequence(nn.Module):
    """Two feed-forward blocks; between them is what works on the tokens of one rank."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH, bias=False)
        self.between = between
        self.c, self.d = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        return self.d(functional.gelu(self.c(self.between(self.b(functional.gelu(self.a(x)))))))


def _split(between, *, scattered=1, gathered=1):
    """Scatter sums along an axis before the middle module, and gather behind it."""
    sch = scheduled(lambda: _Sequence(between)).at["a"].colwise().at["b"].rowwise(sequence_axis=scattered)
    return sch.at["c"].colwise(sequence_axis=gathered).at["d"].rowwise(), x(4, TOKENS)


@right("a function of each token on a split sequence")
def each_token():
    return _split(Do(lambda y: functional.layer_norm(y, y.shape[-1:]).softmax(-1)))


@right("batches split in place of sequences")
def batches():
    return _split(Do(torch.tanh), scattered=0, gathered=0)


@wrong("tokens scattered, batches gathered", where="c")
def other_axis():
    """Both sizes are even, so that shapes meet nowhere but at the end."""
    return _split(Do(torch.tanh), gathered=0)


@wrong("tokens scattered and never gathered", where="d")
def never_gathered():
    """Each rank computes its features of its own tokens, and the last sum adds different tokens."""
    sch = scheduled(lambda: _Sequence(Do(torch.tanh))).at["a"].colwise().at["b"].rowwise(sequence_axis=1)
    return sch.at["c"].colwise().at["d"].rowwise(), x(4, TOKENS)


@wrong("layer norm on a split sequence, the gradient of its bias not summed", where="between.bias")
def bias_of_norm_not_summed():
    sch, inputs = _split(nn.LayerNorm(WIDTH))
    return sch.at["between"].sum_gradient("weight"), inputs


@wrong("a whole layer on a split sequence, its gradients not summed", where="between")
def layer_not_summed():
    return _split(nn.Linear(WIDTH, WIDTH))


@right("a whole layer on a split sequence, its gradients summed")
def layer_summed():
    sch, inputs = _split(nn.Linear(WIDTH, WIDTH))
    return sch.at["between"].sum_gradient(), inputs


MIXED = {
    "token shift on a split sequence": lambda y: y + functional.pad(y, (0, 0, 1, -1)),
    "running sum along a split sequence": lambda y: y.cumsum(1),
    "attention among the tokens of one rank": lambda y: functional.scaled_dot_product_attention(y, y, y),
    "mean of a split sequence taken off": lambda y: y - y.mean(1, keepdim=True),
    "first token of a split sequence added to all": lambda y: y + y[:, :1],
    "positions counted from the first token of each rank": lambda y: (
        y + torch.arange(y.shape[1], device=y.device).to(y.dtype)[:, None]
    ),
    "an auxiliary norm over the tokens of one rank": lambda y: y / y.square().mean().sqrt(),
}
for _name, _function in MIXED.items():
    wrong(_name, where="between")(lambda function=_function: _split(Do(function)))


class _Causal(nn.Module):
    """A convolution along tokens, each channel on its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, x):
        return self.conv(functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


@wrong("convolution along a split sequence without its neighbours' tokens", where="between")
def convolution():
    sch, inputs = _split(_Causal())
    return sch.at["between.conv"].sum_gradient(), inputs


@right("convolution along a whole sequence that is split behind it")
def convolution_of_all_tokens():
    sch = scheduled(lambda: _Sequence(_Causal())).at["a"].colwise().at["b"].rowwise()
    sch = sch.at["between"].sync("backward_pre", "all_gather", axis=1)
    return sch.at["c"].colwise(sequence_axis=1).at["d"].rowwise(), x(4, TOKENS)


def _llama():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    sch = scheduled(lambda: LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, **sizes)))
    sch = sch.at["model.layers.0"].sync("backward_post", "all_gather", axis=1)
    sch = sch.at["**.self_attn"].sync("forward_pre", "all_gather", axis=1)
    sch = sch.at["**.[qkv]_proj.weight"].shard(axis=0, granule=4).at["**.o_proj"].rowwise(sequence_axis=1, granule=4)
    sch = sch.at["**.mlp.{gate,up}_proj"].colwise(sequence_axis=1).at["**.mlp.down_proj"].rowwise(sequence_axis=1)
    return sch.at["model.norm"].sync("forward_post", "all_gather", axis=1)


def _tokens():
    return {"input_ids": ids(3, TOKENS)["ids"], "use_cache": False}


@right("a Llama with a split sequence")
def llama():
    return _llama().at["**.{input,post_attention}_layernorm"].sum_gradient().at["model.norm"].sum_gradient(), _tokens()
