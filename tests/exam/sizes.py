"""Numbers that code reads from sizes: local ones where the whole model has others, and whole ones that it has stored."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .blocks import (
    HEAD_DIM,
    HEADS,
    VOCAB,
    WIDE,
    WIDTH,
    Attention,
    Behind,
    Between,
    Language,
    ids,
    mlp,
    scheduled,
    split_between,
    split_mlp,
    trusted_between,
    x,
)
from .entry import right, wrong


class _Stored(nn.Module):
    """Activations divided by a width that is stored."""

    def __init__(self):
        super().__init__()
        self.width = WIDE

    def forward(self, y):
        return y.tanh() / self.width**0.5


@right("a temperature from the stored whole width")
def stored_width():
    return split_between(_Stored())


@wrong("a temperature from a stored width that is made local", where="middle")
def stored_width_made_local():
    sch, inputs = split_between(_Stored())
    return sch.at["middle"].set(width=WIDE // 2), inputs


class _HeadWidth(Attention):
    """Attention that scales its scores by the width of a head, which it counts from all features and heads."""

    def __init__(self):
        super().__init__()
        self.width = HEADS * HEAD_DIM

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (self.width // self.num_heads) ** 0.5
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _head_width(**local):
    sch = scheduled(lambda: Behind(_HeadWidth())).at["body.[qkv]"].colwise().at["body.o"].rowwise()
    return sch.at["body"].set(num_heads=HEADS // 2, **local), x()


@wrong("a head's width from the whole width and the local number of heads", where="body")
def head_width_of_local_heads():
    return _head_width()


@right("a head's width from the local width and the local number of heads")
def head_width():
    return _head_width(width=WIDE // 2)


def _group_norm(num, **local):
    def make():
        return Between(nn.Sequential(nn.Flatten(0, 1), nn.GroupNorm(num, WIDE), nn.Unflatten(0, (3, -1))))

    sch = scheduled(make).at["up"].colwise().at["down"].rowwise().at["middle.1.{weight,bias}"].shard(axis=0)
    return sch.at["middle.1"].set(num_channels=WIDE // 2, **local), x()


@right("group norm with local groups, channels and weights")
def group_norm():
    return _group_norm(HEADS, num_groups=HEADS // 2)


@wrong("group norm whose second of three groups is on both ranks", where="middle.1")
def group_on_both_ranks():
    return _group_norm(3)


@wrong("split features cut into the whole number of heads", where="middle")
def fixed_number_of_chunks():
    return split_between(lambda y: torch.cat([head.softmax(-1) for head in y.chunk(HEADS, -1)], -1))


@right("split features cut into pieces of a head's width")
def pieces_of_a_width():
    def middle(y):
        return torch.cat([head.softmax(-1) for head in y.split(HEAD_DIM, -1)], -1)

    return trusted_between(middle, "it loops over the heads that a rank has")


@right("a product with an identity of the local width")
def identity_matrix():
    def middle(y):
        return y @ torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)

    return trusted_between(middle, "a part of an identity is an identity")


@wrong("a product with a triangle of ones of the local width", where="middle")
def triangle():
    return split_between(lambda y: y @ y.new_ones(y.shape[-1], y.shape[-1]).tril())


@right("split features padded to a multiple, and cut back")
def padded_and_cut_back():
    def middle(y):
        return functional.pad(y, (0, -y.shape[-1] % 16)).tanh()[..., : y.shape[-1]]

    return trusted_between(middle, "what is padded is cut off again")


@wrong("softmax of split features in rows of a fixed number, padded", where="middle")
def padded_rows():
    """Rows of eight: three in all, and one and a half on a rank, the rest of whose second row is padding."""

    def rows(y):
        padded = functional.pad(y, (0, -y.shape[-1] % 8))
        return padded.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)[..., : y.shape[-1]]

    return split_between(rows)


class _Numbered(nn.Module):
    """Features over the square roots of their numbers, which a buffer keeps."""

    def __init__(self):
        super().__init__()
        self.numbers = nn.Buffer(torch.empty(WIDE))

    def reset_parameters(self):
        with torch.no_grad():
            self.numbers.copy_(torch.arange(1.0, WIDE + 1))

    def forward(self, y):
        return y * self.numbers[: y.shape[-1]].rsqrt()


@right("numbers of features in a buffer, split with them")
def numbers_split():
    sch, inputs = split_between(_Numbered())
    return sch.at["middle.numbers"].shard(axis=0), inputs


@wrong("the first numbers of features in a whole buffer", where="middle")
def first_numbers():
    return split_between(_Numbered())


def _totalled(function):
    sch = scheduled(lambda: Between(function, wide_out=1)).at["up"].colwise()
    return sch.at["middle"].sync("forward_post", "all_reduce"), x()


@right("means of split features times their local number, summed")
def means_times_their_number():
    return _totalled(lambda y: y.mean(-1, keepdim=True) * y.shape[-1])


@wrong("sums of split features over their local number, summed", where="middle")
def sums_over_their_number():
    return _totalled(lambda y: y.sum(-1, keepdim=True) / y.shape[-1])


class _Repeated(nn.Module):
    """A scale of a head's features, repeated for as many heads as there are."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(HEAD_DIM))

    def reset_parameters(self):
        nn.init.normal_(self.scale)

    def forward(self, y):
        return (y * self.scale.repeat(y.shape[-1] // HEAD_DIM)).tanh()


@wrong("a scale repeated for local heads, the gradient not summed", where="middle.scale")
def repeated_scale():
    return split_between(_Repeated())


@right("a scale repeated for local heads, the gradient summed")
def repeated_scale_summed():
    sch, inputs = split_between(_Repeated())
    return sch.at["middle"].sum_gradient("scale"), inputs


class _Hashed(nn.Module):
    """An embedding with fewer rows than tokens: a token's row is its number modulo that of rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(VOCAB // 2, WIDTH))

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, ids):
        return functional.embedding(ids % self.weight.shape[0], self.weight)


def _language(embed):
    def make():
        language = Language(mlp())
        language.embed = embed()
        return language

    return split_mlp(scheduled(make), "body.")


@wrong("rows of an embedding by tokens modulo the local number of rows", where="embed")
def hashed_rows():
    sch = _language(_Hashed).at["embed"].shard("weight", axis=0).sync("forward_post", "all_reduce")
    return sch, ids()


@right("features of an embedding by tokens modulo the number of rows, gathered")
def hashed_features():
    sch = _language(_Hashed).at["embed"].shard("weight", axis=1).sync("forward_post", "all_gather", axis=-1)
    return sch, ids()


@right("an embedding by rows with a padding token, whose row is not trained")
def padding_token():
    sch = _language(lambda: nn.Embedding(VOCAB, WIDTH, padding_idx=VOCAB - 1))
    return sch.at["embed"].vocab_parallel(), ids()
