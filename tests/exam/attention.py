"""Attention in other forms: one softmax for all heads, keys that are repeated, and torch's own module."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .blocks import HEAD_DIM, HEADS, WIDE, WIDTH, Attention, Behind, Do, as_heads, scheduled, x
from .entry import right, wrong


class _OneSoftmax(nn.Module):
    """Attention with one matrix of weights: the scores of all heads are added up before the softmax."""

    def __init__(self):
        super().__init__()
        self.first, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDE, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDE) for _ in "qkv")
        self.scores, self.weights = Do(lambda q, k: torch.einsum("bqhd,bkhd->bqk", q, k)), nn.Softmax(-1)

    def forward(self, x):
        y = self.first(x)
        q, k, v = (as_heads(layer(y)) for layer in (self.q, self.k, self.v))
        return self.o(torch.einsum("bqk,bkhd->bqhd", self.weights(self.scores(q, k)), v).flatten(2))


def _one_softmax():
    return scheduled(_OneSoftmax).at["[qkv]"].colwise(granule=HEAD_DIM).at["o"].rowwise(granule=HEAD_DIM)


@wrong("scores of all heads added up, each rank those of its heads", where="weights")
def scores_of_local_heads():
    return _one_softmax(), x()


@wrong("scores summed over ranks, the gradient of their weights not", where="k")
def scores_summed_forward():
    """Each rank's weights have seen its own values alone."""
    return _one_softmax().at["scores"].sync("forward_post", "all_reduce"), x()


@right("scores summed over ranks, and the gradient of their weights too")
def scores_summed():
    return _one_softmax().at["scores"].sync("forward_post", "all_reduce").sync("backward_pre", "all_reduce"), x()


class _Tiled(Attention):
    """Grouped attention whose keys and values are repeated for the queries' heads."""

    def __init__(self, repeat):
        super().__init__(HEADS, 2)
        self.repeat = repeat

    def forward(self, x):
        q, k, v = (as_heads(layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (self.repeat(kept, q.shape[1] // kept.shape[1]) for kept in (k, v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _tiled(repeat):
    return scheduled(lambda: Behind(_Tiled(repeat))).at["body.[qkv]"].colwise().at["body.o"].rowwise(), x()


@right("each key head repeated for its neighbouring queries")
def keys_repeated():
    return _tiled(lambda k, num: k.repeat_interleave(num, 1))


@wrong("key heads repeated in turn for the queries", where="body")
def keys_tiled():
    """Queries 0 and 2 belong to key 0: a rank's queries belong to keys of both ranks."""
    return _tiled(lambda k, num: k.repeat(1, num, 1, 1))


class _MultiHead(nn.Module):
    """torch's own attention, of three different inputs, beside a residual."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in "qkv")
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return x + self.attention(self.q(x), self.k(x), self.v(x), need_weights=False)[0]


@wrong("nn.MultiheadAttention with local heads and parts of its projections", where="attention")
def parts_of_projections():
    """Its code compares all sizes with those of its inputs."""
    sch = scheduled(_MultiHead).at["attention.in_proj_{weight,bias}"].shard(axis=0, blocks=(WIDTH, WIDTH, WIDTH))
    sch = sch.at["attention.out_proj"].shard("weight", axis=1).at["attention"].set(num_heads=HEADS // 2)
    return sch.sync("forward_post", "all_reduce"), x()


@wrong("outputs of nn.MultiheadAttention's projection gathered behind the projection, which it never calls", where="")
def never_called():
    """It computes with the projection's tensors, and passes its module by: parts of outputs meet a whole residual."""
    sch = scheduled(_MultiHead).at["attention.out_proj"].colwise(gather_output=True)
    return sch, x()


def _rows_of_projection():
    """Split the output projection of torch's attention by rows: all that it computes before is whole."""
    sch = scheduled(_MultiHead).at["attention.out_proj.{weight,bias}"].shard(axis=0).at["attention"]
    for which in range(3):
        sch = sch.sync("backward_post", "all_reduce", which=which)
    return sch.sync("forward_post", "all_gather", axis=-1)


@wrong("rows of nn.MultiheadAttention's output projection, the gradients of its whole weights not summed", where="attention")
def rows_alone():
    return _rows_of_projection(), x()


@right("rows of nn.MultiheadAttention's output projection, the gradients of its whole weights summed")
def rows_summed():
    return _rows_of_projection().sum_gradient(), x()
