"""Sums of outputs and of gradients that are forgotten, doubled, misplaced or of another kind."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .blocks import WIDE, WIDTH, Behind, columns_alone, mlp, rows_alone, scheduled, split_mlp, x
from .entry import right, wrong


class _Stack(nn.Module):
    """Two feed-forward blocks, one after another."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH, bias=bias)
        self.act = nn.ReLU()
        self.c, self.d = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        return self.d(torch.tanh(self.c(self.act(self.b(torch.tanh(self.a(x)))))))


@right("two column splits and two row splits in turn")
def stack():
    return scheduled(_Stack).at["{a,c}"].colwise().at["{b,d}"].rowwise(), x()


@wrong("outputs of a row split never summed", where="act")
def never_summed():
    sch = scheduled(lambda: _Stack(bias=False)).at["{a,c}"].colwise().at["d"].rowwise()
    return rows_alone(sch, "b"), x()


@wrong("outputs of a row split summed behind the activation", where="act")
def summed_behind_the_activation():
    sch = scheduled(lambda: _Stack(bias=False)).at["{a,c}"].colwise().at["d"].rowwise()
    return rows_alone(sch, "b").at["act"].sync("forward_post", "all_reduce"), x()


@right("outputs of a row split summed before the activation")
def summed_before_the_activation():
    sch = scheduled(lambda: _Stack(bias=False)).at["{a,c}"].colwise().at["d"].rowwise()
    return rows_alone(sch, "b").at["act"].sync("forward_pre", "all_reduce"), x()


@wrong("inputs of a row split summed", where="body.2")
def inputs_summed():
    sch = scheduled(lambda: Behind(mlp())).at["body.0"].colwise()
    return rows_alone(sch, "body.2").at["body.2"].sync("forward_pre", "all_reduce"), x()


@wrong("outputs of a row split summed twice", where="body")
def summed_twice():
    return split_mlp(scheduled(lambda: Behind(mlp())), "body.").at["body"].sync("forward_post", "all_reduce"), x()


@wrong("outputs of a row split averaged", where="body.2")
def averaged():
    sch = split_mlp(scheduled(lambda: Behind(mlp())), "body.")
    return sch.at["body.2"].sync("forward_post", "divide"), x()


@right("summed twice and divided once")
def summed_twice_and_divided():
    """The second sum and its division cancel, and the gradient, which the division halves, is summed again."""
    sch = split_mlp(scheduled(lambda: Behind(mlp())), "body.").at["body"].sync("forward_post", "all_reduce")
    return sch.at["body"].sync("forward_post", "divide").sync("backward_pre", "all_reduce"), x()


@wrong("equal outputs averaged over ranks", where="first")
def equal_outputs_averaged():
    """Outputs stay what they are, and each rank's gradient is divided."""
    return scheduled(lambda: Behind(mlp())).at["first"].sync("forward_post", "all_reduce").sync(
        "forward_post", "divide"
    ), x()


@wrong("gradient behind a column split never summed", where="first")
def gradient_never_summed():
    return columns_alone(scheduled(lambda: Behind(mlp())), "body.0").at["body.2"].rowwise(), x()


@right("no sum of a gradient that nobody needs")
def gradient_not_needed():
    """The layers are split, and what comes before them is the model's input."""
    return columns_alone(scheduled(mlp), "0").at["2"].rowwise(), {"input": x()["x"]}


@right("no sum of a gradient behind frozen layers")
def gradient_of_frozen_layers():
    def frozen():
        model = Behind(mlp())
        model.first.requires_grad_(False)
        return model

    return columns_alone(scheduled(frozen), "body.0").at["body.2"].rowwise(), x()


@wrong("gradient behind a column split summed twice", where="first")
def gradient_summed_twice():
    return split_mlp(scheduled(lambda: Behind(mlp())), "body.").at["body"].sync("backward_post", "all_reduce"), x()


@right("gradient of two column splits summed once for both")
def gradient_summed_once():
    sch = scheduled(lambda: Behind(_Gate())).at["body.down"].rowwise()
    sch = columns_alone(columns_alone(sch, "body.gate"), "body.up")
    return sch.at["body"].sync("backward_post", "all_reduce"), x()


@wrong("gradient of one of two column splits summed", where="first")
def gradient_of_one_summed():
    sch = scheduled(lambda: Behind(_Gate())).at["body.down"].rowwise().at["body.up"].colwise()
    return columns_alone(sch, "body.gate"), x()


class _Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


class _Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


@wrong("a sum behind the residual instead of before it", where="body")
def residual_summed():
    sch = scheduled(lambda: Behind(_Residual(mlp(bias=False)))).at["body.inner.0"].colwise()
    return rows_alone(sch, "body.inner.2").at["body"].sync("forward_post", "all_reduce"), x()


@right("a sum before the residual")
def residual():
    return split_mlp(scheduled(lambda: Behind(_Residual(mlp()))), "body.inner."), x()


class _Parallel(nn.Module):
    """Two blocks side by side whose outputs are added, as GPT-J's attention and feed-forward block."""

    def __init__(self):
        super().__init__()
        self.left, self.right = mlp(bias=False), mlp(bias=False)

    def forward(self, x):
        return self.left(x) + self.right(x)


@right("two blocks side by side, summed once")
def parallel_blocks():
    sch = scheduled(lambda: Behind(_Parallel()))
    sch = rows_alone(rows_alone(sch.at["body.*.0"].colwise(), "body.left.2"), "body.right.2")
    return sch.at["body"].sync("forward_post", "all_reduce"), x()


@wrong("two blocks side by side, one whole, summed once", where="body")
def one_block_whole():
    sch = scheduled(lambda: Behind(_Parallel())).at["body.left.0"].colwise()
    return rows_alone(sch, "body.left.2").at["body"].sync("forward_post", "all_reduce"), x()


class _Affine(nn.Module):
    """A linear layer of the user's own, which adds its bias itself."""

    def __init__(self, num_in, num_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(num_out, num_in)), nn.Parameter(torch.empty(num_out))

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


def _affine():
    return nn.Sequential(_Affine(WIDTH, WIDE), nn.GELU(), _Affine(WIDE, WIDTH))


@wrong("a bias that each rank adds before the sum", where="body.2")
def bias_added_by_each_rank():
    sch = scheduled(lambda: Behind(_affine())).at["body.0.{weight,bias}"].shard(axis=0)
    sch = sch.at["body.0"].sync("backward_post", "all_reduce").at["body.2"].shard("weight", axis=1)
    return sch.at["body.2"].sync("forward_post", "all_reduce"), x()


@right("a layer of the user's own, split by columns and gathered")
def own_layer_gathered():
    sch = scheduled(lambda: Behind(_affine())).at["body.2.{weight,bias}"].shard(axis=0)
    return sch.at["body.2"].sync("backward_post", "all_reduce").sync("forward_post", "all_gather", axis=-1), x()


class _Scaled(nn.Module):
    """A feed-forward block with trained tensors in its middle.

    Args:
        shape: Shape of the scale: one number, or one for each head's feature.
        trained: Whether it is trained.
    """

    def __init__(self, *shape, trained=True):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.scale = nn.Parameter(torch.empty(shape), requires_grad=trained)

    def reset_parameters(self):
        nn.init.normal_(self.scale)

    def forward(self, x):
        return self.down((self.up(x).unflatten(-1, (-1, 6)) * self.scale).flatten(-2).tanh())


def _scaled(*shape, trained=True):
    sch = scheduled(lambda: Behind(_Scaled(*shape, trained=trained)))
    return sch.at["body.up"].colwise().at["body.down"].rowwise()


@wrong("a whole trained scale within split code", where="body.scale")
def whole_scale():
    return _scaled(6), x()


@right("a whole trained scale within split code, its gradient summed")
def whole_scale_summed():
    return _scaled(6).at["body"].sum_gradient("scale"), x()


@right("a whole frozen scale within split code")
def whole_frozen_scale():
    return _scaled(6, trained=False), x()


@right("a trained scale of each head, split with the heads")
def split_scale():
    return _scaled(4, 6).at["body.scale"].shard(axis=0), x()


@wrong("a trained temperature, one number, within split code", where="body.scale")
def one_temperature():
    return _scaled(), x()


@right("a trained temperature within split code, its gradient summed")
def one_temperature_summed():
    return _scaled().at["body"].sum_gradient("scale"), x()


@wrong("gradient of a norm on whole activations summed", where="body.0")
def norm_summed():
    return _normed().at["body.0"].sum_gradient(), x()


@right("a norm on whole activations")
def norm_not_summed():
    return _normed(), x()


def _normed():
    def make():
        return Behind(nn.Sequential(nn.LayerNorm(WIDTH), mlp()))

    return split_mlp(scheduled(make), "body.1.")


class _LowRank(nn.Module):
    """A frozen linear layer, and a trained product of two small ones beside it (LoRA)."""

    def __init__(self, num_in, num_out):
        super().__init__()
        self.base = nn.Linear(num_in, num_out).requires_grad_(False)
        self.a, self.b = nn.Linear(num_in, 3, bias=False), nn.Linear(3, num_out, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def _low_rank():
    body = nn.Sequential(_LowRank(WIDTH, WIDE), nn.GELU(), _LowRank(WIDE, WIDTH))
    return scheduled(lambda: Behind(body)).at["body.0.base"].colwise().at["body.2.base"].rowwise()


@right("LoRA beside a column split and a row split")
def low_rank():
    return _low_rank().at["body.0.b"].colwise().at["body.2.a"].rowwise(), x()


class _Factor(nn.Module):
    """A feed-forward block whose output is multiplied by a gate of its input."""

    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Linear(WIDTH, WIDTH), mlp(bias=False)

    def forward(self, x):
        return self.gate(x).sigmoid() * self.inner(x)


@wrong("a whole gate times a summand that is summed later", where="body.gate")
def gate_of_a_summand():
    """Outputs are right; each rank's gate has seen its own summand alone."""
    sch = scheduled(lambda: Behind(_Factor())).at["body.inner.0"].colwise()
    return rows_alone(sch, "body.inner.2").at["body"].sync("forward_post", "all_reduce"), x()


@right("a whole gate times a summand, the gate's gradient summed")
def gate_of_a_summand_summed():
    sch = scheduled(lambda: Behind(_Factor())).at["body.inner.0"].colwise()
    sch = sch.at["body.gate"].sync("backward_pre", "all_reduce")
    return rows_alone(sch, "body.inner.2").at["body"].sync("forward_post", "all_reduce"), x()
