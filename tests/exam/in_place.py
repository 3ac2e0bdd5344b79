"""Writes in place, into views and into tensors that code makes, and additions at places that indices tell."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .blocks import (
    HEAD_DIM,
    HEADS,
    WIDE,
    WIDTH,
    Attention,
    Behind,
    Between,
    as_heads,
    mlp,
    rows_alone,
    scheduled,
    split_between,
    trusted_between,
    x,
)
from .entry import right, wrong


def _shifted(y):
    """Move tokens by one, into zeros."""
    out = torch.zeros_like(y)
    out[:, 1:] = y[:, :-1]
    return out


@right("tokens written into zeros of a local size")
def into_local_zeros():
    return split_between(_shifted)


def _at_the_start(y):
    out = y.new_zeros(*y.shape[:-1], WIDE)
    out[..., : y.shape[-1]] = y
    return out


@wrong("split features written at the start of zeros of the whole size, summed", where="middle")
def into_whole_zeros():
    sch = scheduled(lambda: Between(_at_the_start)).at["up"].colwise()
    return sch.at["middle"].sync("forward_post", "all_reduce"), x()


@right("whole features written at the start of zeros of the whole size")
def whole_into_whole_zeros():
    sch = scheduled(lambda: Between(_at_the_start)).at["up"].colwise(gather_output=True)
    return sch.at["down"].rowwise(split_input=True), x()


def _written(write):
    """Return a function that writes into a copy, and gives it back."""

    def function(y):
        out = y.clone()
        write(out)
        return out

    return split_between(function)


@right("the first feature of each head doubled in place, through a view")
def first_features_of_heads():
    return _written(lambda y: as_heads(y)[..., 0].mul_(2))


@wrong("the first head doubled in place, through a view", where="middle")
def first_head():
    return _written(lambda y: as_heads(y)[..., 0, :].mul_(2))


@right("the first token set to zero in place")
def first_token():
    return _written(lambda y: y[:, 0].zero_())


@wrong("the last of split features set to zero in place", where="middle")
def last_feature():
    return _written(lambda y: y[..., -1].zero_())


@right("negative features set to zero by a mask, in place")
def negative_features():
    return _written(lambda y: y.masked_fill_(y < 0, 0.0))


@wrong("a slice that ends behind the split features, doubled in place", where="middle")
def slice_behind_the_end():
    """The first 18 of 24 features are three heads of four; a rank has 12, and doubles all of them."""
    return _written(lambda y: y[..., : 3 * HEAD_DIM].mul_(2))


class _Accumulated(nn.Module):
    """Two blocks whose outputs are added in place, to zeros or to the input."""

    def __init__(self, start):
        super().__init__()
        self.left, self.right, self.total = mlp(bias=False), mlp(bias=False), nn.Identity()
        self.start = start

    def forward(self, y):
        total = self.start(y)
        for block in (self.left, self.right):
            total += block(y)
        return self.total(total)


def _accumulated(start):
    sch = scheduled(lambda: Behind(_Accumulated(start))).at["body.{left,right}.0"].colwise()
    for block in ("left", "right"):
        sch = rows_alone(sch, f"body.{block}.2")
    return sch.at["body.total"].sync("forward_post", "all_reduce"), x()


@right("summands added in place to zeros, and summed")
def added_to_zeros():
    return _accumulated(torch.zeros_like)


@wrong("summands added in place to a whole tensor, and summed", where="body.total")
def added_to_a_whole_tensor():
    return _accumulated(torch.clone)


class _Cached(Attention):
    """Attention whose keys go through a cache with places for all heads."""

    def forward(self, x):
        q, k, v = (as_heads(layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        cache = k.new_zeros(len(k), HEADS, *k.shape[2:])
        cache[:, : self.num_heads] = k
        k = self.read(cache)
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def read(self, cache):
        return cache[:, : self.num_heads]


class _Averaged(_Cached):
    """Attention that takes the mean of all keys of the cache off its keys."""

    def read(self, cache):
        return cache[:, : self.num_heads] - cache.sum(1, keepdim=True) / HEADS


def _cached(make):
    sch = scheduled(lambda: Behind(make())).at["body.[qkv]"].colwise().at["body.o"].rowwise()
    return sch.at["body"].set(num_heads=HEADS // 2), x()


@right("local heads written at the start of a cache for all heads, and read from there")
def cache():
    sch, inputs = _cached(_Cached)
    return sch.at["body"].trust("it reads the places of its cache to which it has written"), inputs


@wrong("the mean over a cache for all heads, in which local heads are", where="body")
def mean_of_a_cache():
    return _cached(_Averaged)


@right("tokens added at places along tokens")
def tokens_added():
    return split_between(lambda y: y.new_zeros(y.shape).index_add(1, torch.arange(y.shape[1], device=y.device) // 2, y))


@right("tokens scattered by their features, each feature for itself")
def tokens_scattered():
    return split_between(lambda y: y.tanh().scatter_add(1, (y > 0).long(), y))


@wrong("features scattered by their signs along a split axis", where="middle")
def features_scattered():
    return split_between(lambda y: y.tanh().scatter_add(-1, (y > 0).long(), y))


@right("neighbouring features exchanged by gather, with numbers of local features")
def neighbours_exchanged():
    """A rank's features are whole pairs, and are numbered from 0 on each rank."""

    def exchanged(y):
        numbers = torch.arange(y.shape[-1], device=y.device)
        return y.tanh() + y.gather(-1, (numbers + 1 - 2 * (numbers % 2)).expand_as(y))

    return trusted_between(exchanged, "its numbers count pairs, of which each rank has whole ones")


class _Ordered(nn.Module):
    """The features of each head in an order that a buffer tells."""

    def __init__(self):
        super().__init__()
        self.order = nn.Buffer(torch.empty(HEAD_DIM, dtype=torch.long))

    def reset_parameters(self):
        with torch.no_grad():
            self.order.copy_(torch.tensor([3, 5, 0, 1, 4, 2]))

    def forward(self, y):
        return as_heads(y)[..., self.order].flatten(-2)


@right("features of each head in an order of their own")
def features_ordered():
    return split_between(_Ordered())


class _Grouped(nn.Module):
    """Sums of the features of each head, by a table that tells each feature's head."""

    def __init__(self):
        super().__init__()
        self.head_of = nn.Buffer(torch.empty(WIDE, dtype=torch.long))

    def reset_parameters(self):
        with torch.no_grad():
            self.head_of.copy_(torch.arange(WIDE) // HEAD_DIM)

    def forward(self, y):
        return y.new_zeros(*y.shape[:-1], HEADS).index_add(-1, self.head_of[: y.shape[-1]], y)


def _grouped():
    sch = scheduled(lambda: Between(_Grouped(), wide_out=HEADS)).at["up"].colwise()
    return sch.at["middle"].sync("forward_post", "all_reduce")


@wrong("features added up by head, by the first entries of a whole table", where="middle")
def first_entries_of_a_table():
    return _grouped(), x()


@right("features added up by head, by a table that is split with them")
def split_table():
    return _grouped().at["middle.head_of"].shard(axis=0), x()


class _Keys(nn.Module):
    """Keys of heads, of which each has features of its own and features that all share, written into new memory."""

    def __init__(self, write):
        super().__init__()
        self.up, self.shared, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, HEAD_DIM), nn.Linear(2 * WIDE, WIDTH)
        self.write = write

    def forward(self, y):
        own = as_heads(self.up(y))
        keys = self.write(own, self.shared(y).unsqueeze(-2))
        return self.down(keys.flatten(-2))


def _keys(write):
    sch = scheduled(lambda: Behind(_Keys(write))).at["body.up"].colwise().at["body.down"].rowwise()
    return sch.at["body.shared"].sync("backward_pre", "all_reduce"), x()


def _wide(own, make):
    return make(own, (*own.shape[:-1], 2 * HEAD_DIM))


def _own_first(own, shared):
    keys = _wide(own, torch.Tensor.new_empty)
    keys[..., :HEAD_DIM].copy_(own)
    keys[..., HEAD_DIM:].copy_(shared.expand(-1, -1, own.shape[-2], -1))
    return keys


def _shared_first(own, shared):
    keys = _wide(own, torch.Tensor.new_zeros)
    keys[..., HEAD_DIM:] = shared
    keys[..., :HEAD_DIM] = own
    return keys


def _shared_in_the_first_head(own, shared):
    keys = _wide(own, torch.Tensor.new_zeros)
    keys[..., :1, HEAD_DIM:] = shared
    keys[..., :HEAD_DIM] = own
    return keys


@right("features of heads, then features that they share, written into new memory")
def own_features_first():
    return _keys(_own_first)


@right("features that heads share, then their own, written into zeros")
def shared_features_first():
    return _keys(_shared_first)


@wrong("features that heads share, written into the first head alone", where="body.down")
def shared_features_in_one_head():
    return _keys(_shared_in_the_first_head)
