"""Contractions of split activations: einsum, products of batches, convolutions, distances, and weights made of factors."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .blocks import HEAD_DIM, HEADS, WIDE, WIDTH, Behind, Between, Pair, as_heads, scheduled, split_between, x
from .entry import right, wrong


class _Contracted(nn.Module):
    """Heads and their features contracted with a weight, as an attention's output projection is written with einsum."""

    def __init__(self, behind):
        super().__init__()
        self.weight, self.behind = nn.Parameter(torch.empty(HEADS, HEAD_DIM, WIDTH)), behind

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, y):
        return self.behind(torch.einsum("bthd,hdo->bto", as_heads(y), self.weight))


def _contracted(behind):
    sch = scheduled(lambda: Pair(nn.Linear(WIDTH, WIDE), _Contracted(behind))).at["up"].colwise()
    return sch.at["down"].shard("weight", axis=0).sync("forward_post", "all_reduce"), x()


@right("heads contracted by einsum, summed")
def contracted():
    return _contracted(lambda y: 3 * y)


@wrong("heads contracted by einsum, squashed before the sum", where="down")
def contracted_and_squashed():
    return _contracted(torch.tanh)


class _TwoSums(nn.Module):
    """An einsum in which two letters vanish, one of each operand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDE, WIDTH))

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, y):
        return torch.einsum("bti,btj,jo->bto", y, y, self.weight)


@wrong("two split letters that vanish in one einsum, summed once", where="down")
def two_sums():
    """Each rank has the products of its own parts; products of parts of two ranks are missing."""
    sch = scheduled(lambda: Pair(nn.Linear(WIDTH, WIDE), _TwoSums())).at["up"].colwise()
    return sch.at["down"].shard("weight", axis=0).sync("forward_post", "all_reduce"), x()


class _PerHead(nn.Module):
    """A matrix for each head."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HEADS, HEAD_DIM, HEAD_DIM))

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, y):
        return torch.einsum("bthd,hde->bthe", as_heads(y), self.weight).tanh().flatten(-2)


@right("an einsum with a split letter in all operands and in the result")
def letter_kept():
    sch, inputs = split_between(_PerHead())
    return sch.at["middle.weight"].shard(axis=0), inputs


def _batched(y):
    """Attention within each head, heads folded into the batch."""
    heads = as_heads(y).transpose(1, 2).flatten(0, 1)
    return torch.bmm(torch.bmm(heads, heads.transpose(1, 2)).softmax(-1), heads)


@right("heads folded into the batch, multiplied and unfolded")
def folded():
    return split_between(lambda y: _batched(y).unflatten(0, (len(y), -1)).transpose(1, 2).flatten(2))


@wrong("heads folded into the batch, unfolded in the other order", where="middle")
def unfolded_in_the_other_order():
    """A permutation of all heads of all examples: that of one rank's heads is another one."""
    return split_between(lambda y: _batched(y).unflatten(0, (-1, len(y))).permute(1, 2, 0, 3).flatten(2))


class _Convolutions(nn.Module):
    """Two convolutions along tokens, the first of which may be transposed."""

    def __init__(self, up, *, bias=False):
        super().__init__()
        self.first, self.up = nn.Linear(WIDTH, WIDTH), up
        self.down = nn.Conv1d(WIDE, WIDTH, 3, padding=1, bias=bias)

    def forward(self, x):
        return self.down(self.up(self.first(x).transpose(1, 2)).tanh()).transpose(1, 2)


def _convolutions(*, transposed=False, **options):
    """Split the first along its outputs, the second along its inputs."""
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    sch = scheduled(lambda: _Convolutions(kind(WIDTH, WIDE, 3, padding=1), **options))
    sch = sch.at["up"].shard("weight", axis=int(transposed)).shard("bias", axis=0).set(out_channels=WIDE // 2)
    sch = sch.sync("backward_post", "all_reduce").at["down"].shard("weight", axis=1).set(in_channels=WIDE // 2)
    return sch.sync("forward_post", "all_reduce"), x()


@right("a convolution along its outputs, and one along its inputs, summed")
def convolutions():
    return _convolutions()


@right("a transposed convolution along its outputs")
def transposed_convolution():
    return _convolutions(transposed=True)


@wrong("the bias of a convolution along its inputs, added by each rank", where="down")
def bias_of_each_rank():
    return _convolutions(bias=True)


@right("pixel shuffle of split channels, the pixels of a channel on one rank")
def pixel_shuffle():
    def middle(y):
        return functional.pixel_shuffle(y.transpose(1, 2).unsqueeze(-1), 2).flatten(2).transpose(1, 2)

    sch = scheduled(lambda: Between(middle, wide_out=WIDE // 4)).at["up"].colwise()
    sch = sch.at["middle"].trust("four channels in a row become one, and ranks have whole fours", gives="split", axis=-1)
    return sch.at["down"].rowwise(), x()


class _Distances(nn.Module):
    """Distances of activations to trained points."""

    def __init__(self, *, squared):
        super().__init__()
        self.points, self.squared = nn.Parameter(torch.empty(WIDTH, WIDE)), squared

    def reset_parameters(self):
        nn.init.normal_(self.points)

    def forward(self, y):
        return (y.unsqueeze(-2) - self.points).square().sum(-1) if self.squared else torch.cdist(y, self.points)


def _distances(*, squared):
    sch = scheduled(lambda: Pair(nn.Linear(WIDTH, WIDE), _Distances(squared=squared))).at["up"].colwise()
    return sch.at["down"].shard("points", axis=1).sync("forward_post", "all_reduce"), x()


@wrong("distances of parts of features to parts of points, summed", where="down")
def distances():
    return _distances(squared=False)


@right("squared distances of parts of features to parts of points, summed")
def squared_distances():
    return _distances(squared=True)


class _Factors(nn.Module):
    """A linear layer whose weight is a product of two factors, added to a whole weight or not."""

    def __init__(self, num_in, num_out, *, has_base=False):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(4, num_in)), nn.Parameter(torch.empty(num_out, 4))
        self.base = nn.Parameter(torch.empty(num_out, num_in)) if has_base else 0.0

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, y):
        return functional.linear(y, self.base + self.b @ self.a)


def _split_rank(**options):
    """Split both factors along the axis that their product sums over."""
    sch = scheduled(lambda: Behind(_Factors(WIDTH, WIDTH, **options))).at["body"].shard("a", axis=0).shard("b", axis=1)
    return sch.sync("backward_post", "all_reduce").sync("forward_post", "all_reduce"), x()


@right("a weight made of two factors, split along their rank")
def split_rank():
    return _split_rank()


@wrong("a whole weight added to two factors that are split along their rank", where="body")
def split_rank_beside_a_weight():
    return _split_rank(has_base=True)


def _split_rows():
    sch = scheduled(lambda: Pair(_Factors(WIDTH, WIDE, has_base=True), nn.Linear(WIDE, WIDTH))).at["down"].rowwise()
    return sch.at["up"].shard("base", axis=0).shard("b", axis=0).sync("backward_post", "all_reduce")


@wrong("a factor that all rows of a weight share, without the sum of its gradient", where="up.a")
def shared_factor_alone():
    return _split_rows(), x()


@right("a factor that all rows of a weight share, with the sum of its gradient")
def shared_factor_summed():
    return _split_rows().at["up"].sum_gradient("a"), x()
