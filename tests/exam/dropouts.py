"""Dropout on parts of activations, which is to differ from rank to rank, and on whole ones, which is not."""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from .blocks import HEADS, WIDE, WIDTH, Attention, Behind, Between, mlp, scheduled, split_mlp, x
from .entry import right, wrong


def _features(dropout):
    sch = scheduled(lambda: Between(dropout)).at["up"].colwise().at["down"].rowwise()
    return sch, x()


@wrong("dropout on split features, drawn alike on all ranks", where="middle")
def features_alike():
    return _features(nn.Dropout(0.5))


@right("dropout on split features, drawn by each rank")
def features_forked():
    sch, inputs = _features(nn.Dropout(0.5))
    return sch.at["middle"].fork_rng(), inputs


@right("dropout with p=0 on split features")
def features_without_dropout():
    return _features(nn.Dropout(0.0))


@wrong("alpha dropout on split features, drawn alike on all ranks", where="middle")
def alpha_dropout_alike():
    return _features(nn.AlphaDropout(0.5))


class _Whole(nn.Module):
    """A feed-forward block and a module on its output."""

    def __init__(self, behind):
        super().__init__()
        self.inner, self.behind = mlp(), behind

    def forward(self, x):
        return x + self.behind(self.inner(x))


def _whole(behind):
    return split_mlp(scheduled(lambda: Behind(_Whole(behind))), "body.inner.")


@right("dropout on summed outputs")
def whole():
    return _whole(nn.Dropout(0.5)), x()


class _DropPath(nn.Module):
    """Leave a block out for some of the examples (stochastic depth)."""

    def forward(self, x):
        return x * functional.dropout(x.new_ones(x.shape[0], 1, 1), 0.5, self.training)


@right("stochastic depth on summed outputs")
def drop_path():
    return _whole(_DropPath()), x(8)


@wrong("stochastic depth on summed outputs, drawn by each rank", where="body.behind")
def drop_path_forked():
    return _whole(_DropPath()).at["body.behind"].fork_rng(), x(8)


def _with_two():
    """A block with dropout on its whole input, and on its split features."""

    def make():
        body = [nn.Dropout(0.5), nn.Linear(WIDTH, WIDE), nn.GELU(), nn.Dropout(0.5), nn.Linear(WIDE, WIDTH)]
        return Behind(nn.Sequential(*body))

    return scheduled(make).at["body.1"].colwise().at["body.4"].rowwise()


@right("dropout on whole inputs and on split features, the latter drawn by each rank")
def inner_forked():
    return _with_two().at["body.3"].fork_rng(), x()


@wrong("a block drawn by each rank, with dropout on its whole input", where="body.0")
def block_forked():
    return _with_two().at["body"].fork_rng(), x()


class _Kernel(Attention):
    """Attention whose kernel draws the dropout of its probabilities."""

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return self.o(out.transpose(1, 2).flatten(2))


def _kernel():
    sch = scheduled(lambda: Behind(_Kernel())).at["body.[qkv]"].colwise().at["body.o"].rowwise()
    return sch.at["body"].set(num_heads=HEADS // 2)


@wrong("dropout within a kernel of attention on split heads, drawn alike on all ranks", where="body")
def kernel_alike():
    return _kernel(), x()


@right("dropout within a kernel of attention on split heads, drawn by each rank")
def kernel_forked():
    return _kernel().at["body"].fork_rng(), x()
