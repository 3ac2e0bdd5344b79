"""Gradients of whole tensors that meet split ones: on one of several ways, through copies, statistics, lists and gathers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .blocks import HEAD_DIM, WIDE, WIDTH, Behind, Do, as_heads, columns_alone, mlp, scheduled, split_between, split_mlp, x
from .entry import right, wrong


class _Modulated(nn.Module):
    """A feed-forward block whose wide features are multiplied by something of its whole input."""

    def __init__(self, read):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH), Do(read)

    def forward(self, y):
        return self.down(self.up(y) * self.gate(y))


def _mean(y):
    return y.mean(-1, keepdim=True).exp()


def _mean_without_grad(y):
    with torch.no_grad():
        return _mean(y)


def _modulated(read):
    return scheduled(lambda: Behind(_Modulated(read))).at["body.up"].colwise().at["body.down"].rowwise()


@wrong("a mean of whole features that multiplies split ones", where="first")
def mean_alone():
    """The features' own way to the input is summed, that of the mean is not."""
    return _modulated(_mean), x()


@right("a mean of whole features that multiplies split ones, its gradient summed")
def mean_summed():
    return _modulated(_mean).at["body.gate"].sync("backward_pre", "all_reduce"), x()


@right("a mean of whole features, detached, that multiplies split ones")
def mean_detached():
    return _modulated(lambda y: _mean(y).detach()), x()


@right("a mean of whole features, without a gradient, that multiplies split ones")
def mean_without_grad():
    return _modulated(_mean_without_grad), x()


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, y):
        return y + self.inner(y)


@wrong("the gradient of a residual summed with that of its branch", where="first")
def residual_summed():
    sch = columns_alone(scheduled(lambda: Behind(_Residual())), "body.inner.0").at["body.inner.2"].rowwise()
    return sch.at["body"].sync("backward_post", "all_reduce"), x()


@right("the gradient of a residual's branch summed")
def branch_summed():
    sch = columns_alone(scheduled(lambda: Behind(_Residual())), "body.inner.0").at["body.inner.2"].rowwise()
    return sch.at["body.inner"].sync("backward_post", "all_reduce"), x()


def _gathered_and_split():
    """Return the schedule of two blocks in a row, of which the second begins with layers whose gradient nothing sums."""
    sch = columns_alone(scheduled(lambda: Behind(nn.Sequential(nn.Linear(WIDTH, WIDE), nn.GELU(), *_more()))), "body.2")
    return sch.at["body.0"].colwise().at["body.4"].rowwise()


def _more():
    return nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, WIDTH)


@wrong("outputs gathered before a split layer, each rank's gradient its own", where="body.0")
def gathered_before_a_split_layer():
    return _gathered_and_split().at["body.1"].sync("forward_post", "all_gather", axis=-1), x()


@right("outputs gathered before a split layer, the gradient summed")
def gathered_with_the_sum():
    return _gathered_and_split().at["body.2"].sync("forward_pre", "all_gather", axis=-1), x()


class _BothWays(nn.Module):
    """A weight that is used twice, the second time transposed."""

    def __init__(self, penalty):
        super().__init__()
        self.weight, self.penalty = nn.Parameter(torch.empty(WIDE, WIDTH)), penalty

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, y):
        return functional.linear(functional.linear(y, self.weight).tanh(), self.weight.T) + self.penalty(self.weight)


def _both_ways(penalty):
    sch = scheduled(lambda: Behind(_BothWays(penalty))).at["body"].shard("weight", axis=0)
    return sch.sync("backward_post", "all_reduce").sync("forward_post", "all_reduce"), x()


@right("squares of a split weight, used twice, added before the sum")
def squares_added():
    return _both_ways(lambda w: w.square().sum())


@wrong("the norm of a split weight, used twice, added before the sum", where="body")
def norm_added():
    return _both_ways(lambda w: w.norm())


class _Watched(nn.Module):
    """Features whose mean is kept as it changes, or looked at and forgotten."""

    def __init__(self, *, is_kept):
        super().__init__()
        self.is_kept = is_kept
        if is_kept:
            self.register_buffer("mean", torch.empty(()))

    def reset_parameters(self):
        if self.is_kept:
            nn.init.ones_(self.mean)

    def forward(self, y):
        with torch.no_grad():
            mean = y.softmax(-1).square().mean()
            if self.is_kept:
                self.mean.lerp_(mean, 0.5)
        return y.tanh()


@wrong("a statistic of split features, kept in a buffer", where="middle.mean")
def statistic_kept():
    """The model computes nothing with it while it trains."""
    return split_between(_Watched(is_kept=True))


@right("a statistic of split features that nothing depends on")
def statistic_forgotten():
    return split_between(_Watched(is_kept=False))


class _Listed(nn.Module):
    """A feed-forward block whose tensors are in lists."""

    def __init__(self, *shape):
        super().__init__()
        self.weights = nn.ParameterList([torch.empty(WIDE, WIDTH), torch.empty(WIDTH, WIDE)])
        self.scales = nn.ParameterList([torch.empty(shape)])

    def reset_parameters(self):
        for tensor in (*self.weights, *self.scales):
            nn.init.normal_(tensor)

    def forward(self, y):
        heads = as_heads(functional.linear(y, self.weights[0])) * self.scales[0]
        return functional.linear(heads.flatten(-2).tanh(), self.weights[1])


def _listed(*shape):
    sch = scheduled(lambda: Behind(_Listed(*shape))).at["body"].sync("backward_post", "all_reduce")
    sch = sch.sync("forward_post", "all_reduce")
    return sch.at["body.weights.0"].shard(axis=0).at["body.weights.1"].shard(axis=1)


@right("tensors of lists, all of them split")
def lists_split():
    return _listed(4, HEAD_DIM).at["body.scales.0"].shard(axis=0), x()


@wrong("a whole scale in a list, within split code", where="body.scales")
def scale_of_a_list():
    return _listed(HEAD_DIM), x()


@wrong("a whole scale in a list, its sum declared at the list, which is never called", where="body.scales")
def sum_at_a_list():
    return _listed(HEAD_DIM).at["body.scales"].sum_gradient(), x()


@wrong("the gradient of a residual summed whose branch is detached", where="first")
def sum_on_a_whole_way():
    """The residual's gradient is whole, and no other reaches the block's input."""
    sch = split_mlp(scheduled(lambda: Behind(_DetachedBranch())), "body.inner.")
    return sch.at["body"].sync("backward_post", "all_reduce"), x()


class _DetachedBranch(_Residual):
    def forward(self, y):
        return y + self.inner(y.detach())


@right("no sum of the gradient of a block whose input is detached")
def detached_branch():
    sch = columns_alone(scheduled(lambda: Behind(_DetachedBranch())), "body.inner.0")
    return sch.at["body.inner.2"].rowwise(), x()


class _Turned(nn.Module):
    """A block whose whole input is turned in pairs of neighbouring features before it, as rotary positions do."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, y):
        turned = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
        return self.inner(y + turned) + functional.softplus(y[..., ::2]).sum(-1, keepdim=True)


@right("a block behind pairs of neighbouring features")
def behind_pairs():
    return split_mlp(scheduled(lambda: Behind(_Turned())), "body.inner."), x()


@wrong("the gradient of a block behind pairs of neighbouring features, nowhere summed", where="first")
def behind_pairs_alone():
    sch = columns_alone(scheduled(lambda: Behind(_Turned())), "body.inner.0")
    return sch.at["body.inner.2"].rowwise(), x()


@wrong("the gradient of a layer before pairs of neighbouring features, summed though it is whole", where="first")
def before_pairs_summed():
    sch = split_mlp(scheduled(lambda: Behind(_Turned())), "body.inner.")
    return sch.at["first"].sync("backward_pre", "all_reduce"), x()
