"""Small modules that the entries are made of, and schedules that split them over two ranks."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional

from shardplan.functional import create_schedule
from shardplan.specs import Mesh

WIDTH, WIDE, HEADS, HEAD_DIM, VOCAB = 12, 24, 4, 6, 20
"""Sizes of activations: outside and between split layers, where four heads of six features are side by side."""

TENSOR = Mesh(tensor=2)


class Do(nn.Module):
    """Call a function of activations."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Between(nn.Module):
    """A middle module between a layer whose outputs are split and one whose inputs are split."""

    def __init__(self, middle, wide_out=WIDE):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDE)
        self.middle = middle if isinstance(middle, nn.Module) else Do(middle)
        self.down = nn.Linear(wide_out, WIDTH)

    def forward(self, x):
        return self.down(self.middle(self.up(self.first(x))))


class Attention(nn.Module):
    """Causal attention whose keys and values may have fewer heads than its queries."""

    def __init__(self, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q = nn.Linear(WIDTH, num_heads * head_dim)
        self.k = nn.Linear(WIDTH, num_kv_heads * head_dim)
        self.v = nn.Linear(WIDTH, num_kv_heads * head_dim)
        self.o = nn.Linear(num_heads * head_dim, WIDTH)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (y.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2) for y in (self.k(x), self.v(x)))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.num_heads != self.num_kv_heads
        )
        return self.o(out.transpose(1, 2).flatten(2))


class Behind(nn.Module):
    """A linear layer and a module behind it, so that the module's input has a gradient that someone needs."""

    def __init__(self, body):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = body

    def forward(self, x):
        return self.body(self.first(x))


class Changed(nn.Module):
    """A linear layer whose weight is changed by a function in each forward pass."""

    def __init__(self, num_in, num_out, change):
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.empty(num_out, num_in)), change

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        return functional.linear(x, self.change(self.weight))


class Pair(nn.Module):
    """Two layers in a chain, the first of which is split along its outputs, the second along its inputs."""

    def __init__(self, up, down):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(WIDTH, WIDTH), up, down

    def forward(self, x):
        return self.down(self.up(self.first(x)).tanh())


class Language(nn.Module):
    """An embedding, a body, and a head that may be tied to the embedding."""

    def __init__(self, body, *, vocab=VOCAB, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        self.body = body
        self.head = nn.Linear(WIDTH, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def mlp(*, bias=True):
    """Return a feed-forward block; ``bias`` tells whether its last layer has one."""
    return nn.Sequential(nn.Linear(WIDTH, WIDE), nn.GELU(), nn.Linear(WIDE, WIDTH, bias=bias))


def scheduled(make, mesh=TENSOR):
    """Return a schedule without declarations for a model that is built on the meta device."""
    with torch.device("meta"):
        model = make().to("meta")  # parts may have been made before
    return create_schedule(model, mesh)


def as_heads(y):
    """Return features as heads and the features of each."""
    return y.unflatten(-1, (-1, HEAD_DIM))


def split_between(middle):
    """Return the schedule and inputs of a middle module between a column split and a row split."""
    sch = scheduled(lambda: Between(middle))
    return sch.at["up"].colwise().at["down"].rowwise(), x()


def changed_columns(change):
    """Return the schedule and inputs of two layers, of which the first changes its weight, and has some of its rows."""
    sch = scheduled(lambda: Pair(Changed(WIDTH, WIDE, change), nn.Linear(WIDE, WIDTH))).at["down"].rowwise()
    return sch.at["up"].shard("weight", axis=0).sync("backward_post", "all_reduce"), x()


def changed_rows(change):
    """Return the schedule and inputs of two layers, of which the second changes its weight, and has some of its columns."""
    sch = scheduled(lambda: Pair(nn.Linear(WIDTH, WIDE), Changed(WIDE, WIDTH, change))).at["up"].colwise()
    return sch.at["down"].shard("weight", axis=1).sync("forward_post", "all_reduce"), x()


def columns_alone(sch, path):
    """Split the outputs of a linear layer, without the sum of its input's gradient."""
    return sch.at[f"{path}.{{weight,bias}}"].shard(axis=0).at[path].set(out_features=WIDE // 2)


def rows_alone(sch, path):
    """Split the inputs of a linear layer, without the sum of its outputs."""
    return sch.at[path].shard("weight", axis=1).set(in_features=WIDE // 2)


def trusted_between(middle, reason):
    """Return the same for a middle module of which the user's word is taken: nobody can follow it."""
    sch, inputs = split_between(middle)
    return sch.at["middle"].trust(reason, gives="split", axis=-1), inputs


def split_mlp(sch, path=""):
    return sch.at[f"{path}0"].colwise().at[f"{path}2"].rowwise()


@cache
def _normal(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def x(batch=3, tokens=5, width=WIDTH):
    """Activations that an entry's model is called with."""
    return {"x": _normal((batch, tokens, width)).clone()}


def ids(batch=3, tokens=5, vocab=VOCAB):
    """Tokens that an entry's model is called with; all of the vocabulary's ends are among them."""
    numbers = torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(1))
    numbers[0, 0], numbers[-1, -1] = 0, vocab - 1
    return {"ids": numbers}
