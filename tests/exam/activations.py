"""Functions between a column split and a row split: those that mix the split features, and those that keep them apart.

Each rank has two of the four heads, side by side.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from .blocks import HEAD_DIM, HEADS, WIDE, Between, scheduled, split_between, trusted_between, x
from .entry import right, wrong


def _per_head(function):
    """Return a function that is applied to the features of each head."""
    return lambda y: function(y.unflatten(-1, (-1, HEAD_DIM))).flatten(-2)


def _keep_largest(y, num, axis):
    """Set all but the largest entries to zero."""
    kept = y.abs().topk(num, dim=axis).indices
    return torch.zeros_like(y).scatter(axis, kept, y.gather(axis, kept))


def _rms(y, axis=-1):
    return y * torch.rsqrt(y.square().mean(axis, keepdim=True) + 1e-6)


def _standardised(y, axis):
    return (y - y.mean(axis, keepdim=True)) / (y.std(axis, keepdim=True) + 1e-6)


def _rotated(y, num):
    """Rotate the first features of the last axis, as pairs of halves; later features pass."""
    turned, kept = y[..., :num], y[..., num:]
    a, b = turned.chunk(2, dim=-1)
    angle = torch.arange(y.shape[1], device=y.device).view(-1, *[1] * (y.dim() - 2)) / 3.0
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), kept], dim=-1)


def _features_numbered(y):
    return y * torch.arange(1, y.shape[-1] + 1, device=y.device).rsqrt()


def _gram(y):
    """Channels attend to channels, as in cross-covariance attention."""
    q = functional.normalize(y, dim=1)
    return y @ (q.transpose(-1, -2) @ q).softmax(-1)


MIXED = {
    "softmax over split features": lambda y: y.softmax(-1),
    "logsumexp of split features taken off": lambda y: y - y.logsumexp(-1, keepdim=True),
    "layer norm over split features": lambda y: functional.layer_norm(y, y.shape[-1:]),
    "RMS norm over split features": _rms,
    "L2 normalisation of split features": lambda y: functional.normalize(y, dim=-1),
    "standard deviation of split features": lambda y: _standardised(y, -1),
    "group norm with the whole number of groups on local channels": lambda y: functional.group_norm(
        y.transpose(1, 2), HEADS
    ).transpose(1, 2),
    "response normalised across split channels": lambda y: functional.local_response_norm(y.transpose(1, 2), 5).transpose(
        1, 2
    ),
    "sort of split features": lambda y: y.sort(-1).values,
    "largest of all split features kept": lambda y: _keep_largest(y, 5, -1),
    "cumulative sum along split features": lambda y: y.cumsum(-1),
    "roll of split features": lambda y: y.roll(1, -1),
    "flip of split features": lambda y: y * y.flip(-1),
    "maximum of split features taken off": lambda y: y - y.amax(-1, keepdim=True),
    "argmax of split features as a gate": lambda y: y * functional.one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype),
    "softmax temperature from the local width": lambda y: y.tanh() / y.shape[-1] ** 0.5,
    "positions of features counted from the local start": _features_numbered,
    "halves of split features multiplied": lambda y: torch.cat([y.chunk(2, -1)[0] * y.chunk(2, -1)[1].sigmoid()] * 2, -1),
    "a slice of the first split features set to zero": lambda y: torch.cat([torch.zeros_like(y[..., :6]), y[..., 6:]], -1),
    "rotary angles on the first of all split features": lambda y: _rotated(y, HEAD_DIM),
    "Fourier transform over split features": lambda y: torch.fft.fft(y, dim=-1).real,
    "moving average over split features": lambda y: functional.avg_pool1d(y, 3, stride=1, padding=1),
    "channel shuffle across split channels": lambda y: y.unflatten(-1, (HEADS, -1)).transpose(-1, -2).flatten(-2),
    "channels that attend to split channels": _gram,
    "a gate from the mean of split features": lambda y: y * y.mean(-1, keepdim=True).sigmoid(),
}
"""Functions that need all features at once, by what they do."""

KEPT_APART = {
    "softmax over tokens": lambda y: y.softmax(1),
    "softmax within each head": _per_head(lambda y: y.softmax(-1)),
    "layer norm within each head": _per_head(lambda y: functional.layer_norm(y, y.shape[-1:])),
    "RMS norm within each head": _per_head(_rms),
    "L2 normalisation along tokens": lambda y: functional.normalize(y, dim=1),
    "standard deviation along tokens": lambda y: _standardised(y, 1),
    "group norm with the local number of groups": lambda y: functional.group_norm(
        y.transpose(1, 2), y.shape[-1] // HEAD_DIM
    ).transpose(1, 2),
    "sort of tokens for each feature": lambda y: y.sort(1).values,
    "largest tokens kept for each feature": lambda y: _keep_largest(y, 2, 1),
    "largest features kept within each head": _per_head(lambda y: _keep_largest(y, 2, -1)),
    "cumulative sum along tokens": lambda y: y.cumsum(1),
    "roll of tokens": lambda y: y.roll(1, 1),
    "flip of tokens": lambda y: y * y.flip(1),
    "maximum over tokens taken off": lambda y: y - y.amax(1, keepdim=True),
    "temperature from the number of tokens": lambda y: y.tanh() / y.shape[1] ** 0.5,
    "temperature from the width of a head": _per_head(lambda y: y.tanh() / y.shape[-1] ** 0.5),
    "pairs of neighbouring features multiplied": lambda y: (y[..., ::2] * y[..., 1::2].sigmoid()).repeat_interleave(2, -1),
    "rotary angles on half of each head": _per_head(lambda y: _rotated(y, HEAD_DIM // 2 + 1)),
    "Fourier transform over tokens": lambda y: torch.fft.fft(y, dim=1).real,
    "a read of the width that changes nothing": lambda y: y.view(*y.shape[:-1], y.shape[-1]).relu(),
    "chunk along tokens, in another order": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1).tanh(),
}
"""Functions that need the features of one head, or one feature, at a time."""

for _name, _function in MIXED.items():
    wrong(_name, where="middle")(partial(split_between, _function))
for _name, _function in KEPT_APART.items():
    right(_name)(partial(split_between, _function))


@wrong("layer norm of the local width, with split weights", where="middle")
def layer_norm_of_local_width():
    sch, inputs = split_between(nn.LayerNorm(WIDE))
    return sch.at["middle.{weight,bias}"].shard(axis=0).at["middle"].set(normalized_shape=[WIDE // 2]), inputs


@right("batch norm of split channels")
def batch_norm():
    sch, inputs = _on_channels(nn.BatchNorm1d(WIDE))
    return sch.at["middle.running_{mean,var}"].shard(axis=0).at["middle"].set(num_features=WIDE // 2), inputs


@right("instance norm of split channels")
def instance_norm():
    sch, inputs = _on_channels(nn.InstanceNorm1d(WIDE, affine=True))
    return sch.at["middle"].set(num_features=WIDE // 2), inputs


@right("PReLU with a slope for each split channel")
def prelu():
    return _on_channels(nn.PReLU(WIDE), "weight")


@right("layer norm over all features, gathered before it")
def gathered_before_the_norm():
    sch = scheduled(lambda: Between(nn.LayerNorm(WIDE)))
    return sch.at["up"].colwise(gather_output=True).at["down"].rowwise(split_input=True), x()


@wrong("layer norm whose input is gathered only behind it", where="middle")
def gathered_behind_the_norm():
    sch = scheduled(lambda: Between(nn.LayerNorm(WIDE)))
    sch = sch.at["up"].colwise().at["middle.{weight,bias}"].shard(axis=0).at["middle"].set(normalized_shape=[WIDE // 2])
    return sch.at["middle"].sync("forward_post", "all_gather", axis=-1).at["down"].rowwise(split_input=True), x()


class _Channels(nn.Module):
    """Layers on channels, which are axis 1."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.up = nn.Linear(5, 5), nn.Conv1d(WIDE // 2, WIDE, 1, bias=False)
        self.middle = middle
        self.down = nn.Conv1d(WIDE, WIDE // 2, 1, bias=False)

    def forward(self, x):
        return self.down(self.middle(self.up(self.first(x))).tanh())


def _on_channels(middle, tensors="{weight,bias}"):
    """Return the schedule and inputs of a module between convolutions that are split by channels."""
    sch = scheduled(lambda: _Channels(middle))
    sch = sch.at["up"].shard("weight", axis=0).sync("backward_post", "all_reduce").set(out_channels=WIDE // 2)
    sch = sch.at["down"].shard("weight", axis=1).sync("forward_post", "all_reduce").set(in_channels=WIDE // 2)
    return sch.at[f"middle.{tensors}"].shard(axis=0), x(3, WIDE // 2, 5)


@right("average of aligned pairs of features")
def average_of_pairs():
    def middle(y):
        return functional.avg_pool1d(y, 2).repeat_interleave(2, -1)

    return trusted_between(middle, "ranks have whole pairs")
