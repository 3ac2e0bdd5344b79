"""Heads and groups: numbers of heads that modules keep, heads that are shared, and tensors with an entry for each head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from shardplan.specs import Mesh

from .blocks import HEAD_DIM, HEADS, TENSOR, WIDE, WIDTH, Attention, Behind, scheduled, x
from .entry import right, wrong


def _attention(body=Attention, mesh=TENSOR, **split):
    """Return the schedule of an attention module whose projections are split, and whose numbers of heads are global."""
    sch = scheduled(lambda: Behind(body()), mesh)
    return sch.at["body.[qkv]"].colwise(**split).at["body.o"].rowwise(**split)


@right("attention with local heads")
def local_heads():
    return _attention().at["body"].set(num_heads=2, num_kv_heads=2), x()


@wrong("heads not made local", where="body")
def heads_not_local():
    return _attention(), x()


@wrong("heads divided twice", where="body")
def heads_divided_twice():
    return _attention().at["body"].set(num_heads=1, num_kv_heads=1), x()


@wrong("heads of queries made local, those of keys and values not", where="body")
def kv_heads_not_local():
    sch = _attention(lambda: Attention(HEADS, 2))
    return sch.at["body"].set(num_heads=2), x()


@right("grouped queries with local keys and values")
def grouped_queries():
    sch = _attention(lambda: Attention(HEADS, 2))
    return sch.at["body"].set(num_heads=2, num_kv_heads=1), x()


@wrong("grouped queries against whole keys and values", where="body")
def whole_keys_and_values():
    """Each rank's queries are spread over all key heads, though they belong to one."""
    sch = scheduled(lambda: Behind(Attention(HEADS, 2))).at["body.q"].colwise().at["body.o"].rowwise()
    return sch.at["body.[kv]"].sync("backward_pre", "all_reduce").at["body"].set(num_heads=2), x()


@right("key heads repeated over neighbours")
def repeated_keys():
    sch = _attention(lambda: Attention(HEADS, 2), Mesh(tensor=4), granule=HEAD_DIM, replicate=True)
    return sch.at["body"].set(num_heads=1, num_kv_heads=1), x()


@wrong("key heads cut instead of repeated", where="body")
def cut_keys():
    sch = scheduled(lambda: Behind(Attention(HEADS, 2, head_dim=4)), Mesh(tensor=4))
    sch = sch.at["body.[qkv]"].colwise().at["body.o"].rowwise()
    return sch.at["body"].set(num_heads=2, num_kv_heads=1), x()


@wrong("heads that do not divide, split by features", where="body")
def heads_do_not_divide():
    return _attention(lambda: Attention(3, 3, head_dim=8)), x()


@right("heads that do not divide, split unevenly by heads")
def uneven_heads():
    sch = _attention(lambda: _ByHeadDim(3, 8), granule=8, uneven=True)
    return sch, x()


@right("heads counted from the width of a head")
def counted_from_head_dim():
    return _attention(lambda: _ByHeadDim(HEADS, HEAD_DIM)), x()


class _ByHeadDim(Attention):
    def __init__(self, num_heads, head_dim):
        super().__init__(num_heads, num_heads, head_dim)
        self.head_dim = head_dim

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@wrong("features of all heads side by side", where="body")
def heads_innermost():
    """Feature f belongs to head f mod 4: parts of the features are parts of every head."""
    return _attention(_HeadsInnermost).at["body"].set(num_heads=2), x()


class _HeadsInnermost(Attention):
    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2) for layer in (self.q, self.k, self.v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).flatten(2))


class _Sloped(Attention):
    """Attention with linear biases (ALiBi): slopes follow from the number of a head."""

    def _slopes(self):
        return 2.0 ** -torch.arange(1, self.num_heads + 1, device=self.q.weight.device)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        places = torch.arange(x.shape[1], device=x.device)
        bias = self._slopes().view(-1, 1, 1).to(x.dtype) * (places[None, :] - places[:, None])
        return self.o(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class _SlopesKept(_Sloped):
    def __init__(self, *, trained=False):
        super().__init__()
        slopes = torch.empty(HEADS)
        if trained:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes)

    def reset_parameters(self):
        with torch.no_grad():
            self.slopes.copy_(2.0 ** -torch.arange(1.0, HEADS + 1))

    def _slopes(self):
        return self.slopes[: self.num_heads]


@wrong("ALiBi slopes counted from the first local head", where="body")
def slopes_of_first_heads():
    return _attention(_Sloped).at["body"].set(num_heads=2), x()


@right("trained slopes of heads split with the heads")
def trained_slopes_split():
    sch = _attention(lambda: _SlopesKept(trained=True)).at["body.slopes"].shard(axis=0)
    return sch.at["body"].set(num_heads=2), x()


class _TalkingHeads(nn.Module):
    """Heads exchange features by a mixing matrix over heads."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.mix = nn.Parameter(torch.empty(HEADS, HEADS))

    def reset_parameters(self):
        nn.init.normal_(self.mix)

    def forward(self, x):
        y = self.up(x).unflatten(-1, (self.num_heads, -1))
        return self.down(torch.einsum("bthd,hg->btgd", y, self.mix[: self.num_heads, : self.num_heads]).flatten(2))


@wrong("heads that exchange features, made local", where="body")
def talking_heads():
    sch = scheduled(lambda: Behind(_TalkingHeads())).at["body.up"].colwise().at["body.down"].rowwise()
    return sch.at["body"].set(num_heads=2).sum_gradient("mix"), x()


class _Convolved(nn.Module):
    """A convolution along tokens, in groups of channels, between projections: Mamba's, Hyena's, ConvNeXt's."""

    def __init__(self, num_groups, per_group=1):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.conv = nn.Conv1d(WIDE, num_groups * per_group, 3, padding=1, groups=num_groups)

    def forward(self, x):
        return self.down(self.conv(self.up(x).transpose(1, 2)).transpose(1, 2).relu())


def _convolved(num_groups, per_group, **attributes):
    sch = scheduled(lambda: Behind(_Convolved(num_groups, per_group))).at["body.up"].colwise().at["body.down"].rowwise()
    return sch.at["body.conv.{weight,bias}"].shard(axis=0).at["body.conv"].set(in_channels=WIDE // 2, **attributes), x()


@right("depthwise convolution with local groups")
def depthwise():
    return _convolved(WIDE, 1, groups=WIDE // 2)


@wrong("depthwise convolution that keeps the whole number of groups", where="body.conv")
def depthwise_of_all_groups():
    return _convolved(WIDE, 1)


@right("grouped convolution with local groups")
def grouped_convolution():
    return _convolved(HEADS, HEAD_DIM, groups=HEADS // 2)


@wrong("grouped convolution whose groups are made one", where="body.conv")
def groups_made_one():
    """Its weight has the inputs of one of four groups, which no longer are the inputs of a local group."""
    return _convolved(HEADS, HEAD_DIM, groups=1)
