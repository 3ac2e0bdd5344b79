"""Numbers and buffers that a forward pass leaves behind, and numbers that are rounded on the way."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import WIDE, WIDTH, Do, scheduled, x
from .entry import right, wrong


class _Noting(nn.Module):
    """A feed-forward block with a buffer, whose outputs go through a module behind it."""

    def __init__(self, note, *, returned=lambda y, up: y, before=lambda y: y):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH, bias=False)
        self.note, self.returned, self.before, self.behind = note, returned, before, Do(lambda y: y)
        self.register_buffer("seen", torch.zeros(3, 5, WIDTH))

    def reset_parameters(self):
        self.seen.zero_()

    def forward(self, x):
        first = self.first(x)
        up = self.up(first)
        summands = self.down(up)
        out = self.behind(self.before(summands))
        self.note(self.seen, summands.detach(), out.detach())
        return self.returned(out + first, up)


def _noting(note=lambda seen, summands, out: None, **options):
    sch = scheduled(lambda: _Noting(note, **options)).at["up"].colwise().at["down"].shard("weight", axis=1)
    return sch.at["down"].set(in_features=WIDE // 2).at["behind"].sync("forward_post", "all_reduce"), x()


@wrong("summands kept in a buffer", where="seen")
def summands_in_a_buffer():
    return _noting(lambda seen, summands, out: seen.copy_(summands))


@right("sums kept in a buffer")
def sums_in_a_buffer():
    return _noting(lambda seen, summands, out: seen.mul_(0.9).add_(out))


@wrong("the local width returned beside the output", where="")
def local_width_returned():
    return _noting(returned=lambda y, up: (y, up.shape[-1]))


@right("the number of tokens returned beside the output")
def tokens_returned():
    return _noting(returned=lambda y, up: (y, up.shape[1]))


def _to_integers(y):
    return torch.zeros(y.shape, dtype=torch.int64).copy_((9 * y).detach()).to(y.dtype) + y


@wrong("summands rounded to integers before they are summed", where="behind")
def summands_rounded():
    return _noting(before=_to_integers)


@right("sums rounded to integers")
def sums_rounded():
    return _noting(returned=lambda y, up: _to_integers(y))


class _Divided(nn.Module):
    """Whole activations, rounded down after a division by an attribute."""

    def __init__(self, rounding_mode):
        super().__init__()
        self.first, self.behind, self.num, self.rounding_mode = nn.Linear(WIDTH, WIDTH), Do(lambda y: y), 1, rounding_mode

    def forward(self, x):
        first = self.first(x)
        return self.behind(torch.div(7 * first, self.num, rounding_mode=self.rounding_mode)) + first


def _divided(rounding_mode):
    sch = scheduled(lambda: _Divided(rounding_mode)).at[""].set(num=2).at["behind"].sync("forward_post", "all_reduce")
    return sch.sync("backward_pre", "all_reduce"), x()


@wrong("shares of ranks rounded down, and summed", where="behind")
def shares_rounded():
    return _divided("floor")


@right("shares of ranks summed")
def shares():
    return _divided(None)
