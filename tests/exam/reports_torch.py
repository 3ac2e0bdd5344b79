"""Public reports of torch's distributed tensors, and of weights and activations that are normalised over what is split."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from shardplan.functional import create_schedule
from shardplan.specs import Mesh

from .blocks import (
    HEAD_DIM,
    HEADS,
    TENSOR,
    WIDE,
    WIDTH,
    Between,
    Do,
    Pair,
    changed_columns,
    changed_rows,
    scheduled,
    split_between,
    x,
)
from .entry import right, wrong


def _of_norm_one(weight):
    return weight / weight.norm()


def _rows_of_norm_one(weight):
    return weight / weight.norm(dim=1, keepdim=True)


@wrong("a weight divided by the norm of its local rows", where="up", report="family of pytorch#61470")
def norm_of_local_rows():
    """The report is of normalised weights that distributed training cannot copy; here it trains, on another weight."""
    return changed_columns(_of_norm_one)


@wrong("rows of a weight divided by the norms of their local parts", where="down", report="family of pytorch#61470")
def norms_of_parts_of_rows():
    return changed_rows(_rows_of_norm_one)


@right("rows of a weight divided by their norms, on the rank that holds them", report="family of pytorch#61470")
def norms_of_whole_rows():
    return changed_columns(_rows_of_norm_one)


def _parametrised(place):
    """Return a schedule of two layers with values, of which the one at a place has torch's ``weight_norm``."""
    layers = Pair(nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH, bias=False))
    weight_norm(layers.get_submodule(place))
    return create_schedule(layers, TENSOR)


@wrong("torch's weight norm on a layer that is split along its inputs", where="down", report="family of pytorch#61470")
def weight_norm_along_inputs():
    sch = _parametrised("down").at["up"].colwise().at["down.parametrizations.weight.original1"].shard(axis=1)
    return sch.at["down"].set(in_features=WIDE // 2).sync("forward_post", "all_reduce"), x()


@right("torch's weight norm on a layer that is split along its outputs", report="family of pytorch#61470")
def weight_norm_along_outputs():
    sch = _parametrised("up").at["up.parametrizations.weight.original{0,1}"].shard(axis=0).at["up"].shard("bias", axis=0)
    sch = sch.set(out_features=WIDE // 2).sync("backward_post", "all_reduce")
    return sch.at["down"].rowwise(), x()


class _MeanTaken(nn.Module):
    """A mean over features, taken off them."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean if isinstance(mean, nn.Module) else Do(mean)

    def forward(self, x):
        return x - self.mean(x)


class _MeanOfSum(nn.Module):
    """A mean over features, from their sum and their number in the whole model."""

    def __init__(self, num):
        super().__init__()
        self.sum, self.num = Do(lambda x: x.sum(-1, keepdim=True)), num

    def forward(self, x):
        return self.sum(x) / self.num


UNEVEN = 13
"""A number of features that two ranks do not share equally: seven and six."""


def _uneven(mean):
    def make():
        between = Between(_MeanTaken(mean), wide_out=UNEVEN)
        between.up = nn.Linear(WIDTH, UNEVEN)
        return between

    return scheduled(make).at["up"].colwise(uneven=True).at["down"].rowwise(uneven=True)


@wrong("the mean of the means of uneven parts", where="middle.mean", report="pytorch#162692")
def mean_of_uneven_means():
    sch = _uneven(lambda y: y.mean(-1, keepdim=True)).at["middle.mean"].sync("forward_post", "all_reduce")
    return sch.sync("forward_post", "divide").sync("backward_pre", "all_reduce"), x()


@right("the mean from the sum of uneven parts", report="pytorch#162692")
def mean_of_uneven_sums():
    sch = _uneven(_MeanOfSum(UNEVEN)).at["middle.mean.sum"].sync("forward_post", "all_reduce")
    return sch.sync("backward_pre", "all_reduce"), x()


class _NormOfSum(nn.Module):
    """A layer's outputs, divided by their norm."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH, bias=False)
        self.normed = Do(lambda y: functional.normalize(y, dim=-1))

    def forward(self, x):
        return self.normed(self.down(self.up(self.first(x)).relu()))


@wrong("norms of summands, summed", where="normed", report="pytorch#159856")
def norm_of_summands():
    sch = scheduled(_NormOfSum).at["up"].colwise().at["down"].shard("weight", axis=1).set(in_features=WIDE // 2)
    return sch.at["normed"].sync("forward_post", "all_reduce"), x()


@right("the norm of a sum", report="pytorch#159856")
def norm_of_sum():
    return scheduled(_NormOfSum).at["up"].colwise().at["down"].rowwise(), x()


@wrong("layer norm and softmax over a split axis", where="middle", report="pytorch#178785")
def softmax_of_split_axis():
    return split_between(lambda y: functional.layer_norm(y, y.shape[-1:]).softmax(-1))


@right("layer norm and softmax over single heads of a split axis", report="pytorch#178785")
def softmax_of_heads():
    return split_between(
        lambda y: functional.layer_norm(y.unflatten(-1, (-1, HEAD_DIM)), (HEAD_DIM,)).softmax(-1).flatten(-2)
    )


def _viewed(y):
    return y.reshape(y.shape[0], -1, 8)


@wrong("a view of split features as other rows", where="middle", report="pytorch#179502")
def view_of_split_features():
    """Rows of eight features are made of those that a rank has, not of those that are neighbours."""
    sch = scheduled(lambda: Between(_viewed, wide_out=8)).at["up"].colwise()
    return sch.at["middle"].sync("forward_post", "all_gather", axis=1), x(3, 4)


@right("a view of gathered features as other rows", report="pytorch#179502")
def view_of_gathered_features():
    return scheduled(lambda: Between(_viewed, wide_out=8)).at["up"].colwise(gather_output=True), x(3, 4)


@wrong("features in two blocks, contracted with rows in one", where="down", report="pytorch#166598")
def inconsistent_order():
    sch = scheduled(lambda: Between(torch.relu)).at["up"].colwise(blocks=(WIDE // 2, WIDE // 2))
    return sch.at["down"].rowwise(), x()


@right("features in two blocks, contracted with rows in two", report="pytorch#166598")
def consistent_order():
    sch = scheduled(lambda: Between(torch.relu)).at["up"].colwise(blocks=(WIDE // 2, WIDE // 2))
    return sch.at["down"].rowwise(blocks=(WIDE // 2, WIDE // 2)), x()


class _LogSoftmax(nn.Module):
    """Logarithms of probabilities over an axis that may be split."""

    def __init__(self):
        super().__init__()
        self.total = nn.Identity()

    def forward(self, x):
        return x - self.total(x.exp().sum(-1, keepdim=True)).log()


def _log_softmax():
    return split_between(_LogSoftmax())[0].at["middle.total"].sync("forward_post", "all_reduce")


@wrong("a log-softmax over a split axis whose gradient is each rank's", where="up", report="family of pytorch#190746")
def log_softmax_forward_only():
    """The report's operator leaves out the same term of the gradient on all ranks; here each rank has its own part of it."""
    return _log_softmax(), x()


@right("a log-softmax over a split axis, its total's gradient summed", report="family of pytorch#190746")
def log_softmax_summed():
    return _log_softmax().sync("backward_pre", "all_reduce"), x()


class _GroupedNorm(nn.Module):
    """A gated RMS norm over groups of features, as Mamba 2's."""

    def __init__(self):
        super().__init__()
        self.weight, self.num_groups = nn.Parameter(torch.empty(WIDE)), HEADS // 2

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        groups = x.unflatten(-1, (self.num_groups, -1))
        return functional.rms_norm(groups, groups.shape[-1:]).flatten(-2) * self.weight


def _grouped_norm():
    return split_between(_GroupedNorm())[0].at["middle.weight"].shard(axis=0)


@wrong("a norm of all groups' number on the features of one rank", where="middle", report="mamba#908")
def groups_of_all_ranks():
    """Also mamba#916, mamba#951."""
    return _grouped_norm(), x()


@right("a norm of the groups that one rank has", report="mamba#908")
def groups_of_one_rank():
    return _grouped_norm().at["middle"].set(num_groups=1), x()


def _norm_of_heads():
    """Return the schedule of a norm of split heads whose gradient is summed over ``tensor``, beside data ranks."""

    def norm():
        return nn.Sequential(nn.Unflatten(-1, (-1, HEAD_DIM)), nn.RMSNorm(HEAD_DIM), nn.Flatten(-2))

    sch = scheduled(lambda: Between(norm()), Mesh(data=2, tensor=2)).at["up"].colwise().at["down"].rowwise()
    return sch.at["middle.1"].sum_gradient()


@wrong("a gradient that data ranks average, summed over them before", where="first", report="family of pytorch#180346")
def gradient_summed_over_data():
    """That report was not found; this is a fault of two parallelisms that both care for one gradient."""
    return _norm_of_heads().at["first"].sum_gradient(mesh_axis="data"), x(4, 5)


@right("gradients that data ranks average, of parts summed over tensor ranks", report="family of pytorch#180346")
def gradient_summed_over_tensor():
    return _norm_of_heads(), x(4, 5)
