"""Small models of the kinds that people split, and schedules that split them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardplan.functional import create_schedule
from shardplan.specs import Mesh

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "attn_implementation": "eager",
}


def llama(device="meta", **changes):
    """A Llama with grouped-query attention; from a config, nothing is downloaded."""
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))


def split_llama(model, mesh):
    sch = create_schedule(model, mesh)
    num = model.config.num_hidden_layers
    sch = sch.at["model.layers.*.self_attn.[qkv]_proj"].expect(3 * num).colwise()
    sch = sch.at["model.layers.*.self_attn.o_proj"].expect(num).rowwise()
    sch = sch.at["model.layers.*.mlp.{gate,up}_proj"].expect(2 * num).colwise()
    sch = sch.at["model.layers.*.mlp.down_proj"].expect(num).rowwise()
    sch = sch.at["model.embed_tokens"].vocab_parallel()
    return sch.at["lm_head"].colwise(gather_output=True)


class Block(nn.Module):
    """A residual block with biases, one frozen tensor and a buffer."""

    def __init__(self, width, device=None):
        super().__init__()
        self.norm = nn.LayerNorm(width, device=device)
        self.up = nn.Linear(width, 4 * width, device=device)
        self.down = nn.Linear(4 * width, width, device=device)
        self.gain = nn.Parameter(torch.empty(width, device=device), requires_grad=False)
        self.register_buffer("shift", torch.empty(width, device=device))
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            nn.init.uniform_(self.gain, 0.5, 1.5)
            self.shift.copy_(torch.linspace(-0.1, 0.1, self.shift.numel()))

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * self.gain + self.shift


class Plain(nn.Module):
    """A plain module: biases, an embedding, a frozen parameter, a tied head, a registered buffer."""

    def __init__(self, vocab=64, width=16, num_blocks=2, device=None):
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=3, device=device)
        self.blocks = nn.ModuleList(Block(width, device) for _ in range(num_blocks))
        self.head = nn.Linear(width, vocab, bias=False, device=device)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain(device="meta"):
    return Plain(device=device)


def split_plain(model, mesh):
    sch = create_schedule(model, mesh)
    sch = sch.at["blocks.*.up"].expect(2).colwise()
    sch = sch.at["blocks.*.down"].expect(2).rowwise()
    sch = sch.at["embed"].vocab_parallel()
    return sch.at["head"].colwise(gather_output=True)


MODELS = {"llama": (llama, split_llama), "plain": (plain, split_plain)}


def schedule(name, mesh=None):
    make, split = MODELS[name]
    return split(make(), mesh or Mesh())
