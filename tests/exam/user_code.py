"""Functions of the user's own with gradients of their own: within the model, and as synchronisations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from .blocks import WIDE, Behind, columns_alone, mlp, rows_alone, scheduled, split_between, split_mlp, x
from .entry import right, wrong


class _Swish(torch.autograd.Function):
    """A function of each entry, with its derivative written by hand."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y * y.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y.sigmoid() * (1 + y * (1 - y.sigmoid()))


@right("an autograd function of each entry")
def entry_by_entry():
    return split_between(_Swish.apply)


class _Softmax(torch.autograd.Function):
    """A softmax, as kernels have it."""

    @staticmethod
    def forward(ctx, y):
        out = (y - y.amax(-1, keepdim=True)).exp()
        out = out / out.sum(-1, keepdim=True)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return out * (grad - (grad * out).sum(-1, keepdim=True))


@wrong("an autograd function that is a softmax over split features", where="middle")
def own_softmax():
    return split_between(_Softmax.apply)


class _Normalised(torch.autograd.Function):
    """The identity, whose gradient is normalised along an axis."""

    @staticmethod
    def forward(ctx, y, axis):
        ctx.axis = axis
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm(dim=ctx.axis, keepdim=True), None


@wrong("an identity whose gradient is normalised over split features", where="up")
def gradient_normalised():
    """The forward pass is right, and says nothing of the gradient."""
    return split_between(lambda y: _Normalised.apply(y, -1))


@right("an identity whose gradient is normalised over tokens")
def gradient_normalised_over_tokens():
    return split_between(lambda y: _Normalised.apply(y, 1))


def _hooked(axis):
    def function(y):
        out = y.tanh()
        if out.requires_grad:
            out.register_hook(lambda grad: grad / grad.norm(dim=axis, keepdim=True))
        return out

    return split_between(function)


@wrong("a hook that normalises a gradient over split features", where="up")
def hook_over_features():
    return _hooked(-1)


@right("a hook that normalises a gradient over tokens")
def hook_over_tokens():
    return _hooked(1)


class _Checkpointed(nn.Module):
    """A feed-forward block that is computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, y):
        return checkpoint(self.inner, y, use_reentrant=False)


@right("a split block that is computed again in the backward pass")
def checkpointed():
    return split_mlp(scheduled(lambda: Behind(_Checkpointed())), "body.inner."), x()


def _total(tensor, group):
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group.process_group)
    return total


class _SumOfGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return _total(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient passes."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _total(tensor, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumBothWays(_Sum):
    """The sum over ranks, whose gradient is summed as well, as that of ``torch.distributed.nn.functional.all_reduce`` is."""

    @staticmethod
    def backward(ctx, grad):
        return _total(grad, ctx.group), None


class _MeanOfGradient(_Sum):
    """The sum over ranks, whose gradient is divided by their number."""

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.group.num_ranks, None


def _summed_by(function, gives=None):
    """Return the schedule of two layers, split by a sum of the user's own."""
    sch = rows_alone(scheduled(lambda: Behind(mlp(bias=False))).at["body.0"].colwise(), "body.2")
    return sch.at["body.2"].sync("forward_post", function.apply, gives=gives), x()


@right("a sum by an autograd function of the user's own")
def own_sum():
    return _summed_by(_Sum, "whole")


@wrong("a sum by an autograd function whose gradient is summed too", where="body.2")
def own_sum_both_ways():
    return _summed_by(_SumBothWays)


@wrong("a sum by an autograd function whose gradient is divided by the ranks", where="body.2")
def own_mean_of_gradient():
    return _summed_by(_MeanOfGradient)


@right("the sum of a gradient by an autograd function of the user's own")
def own_sum_of_gradient():
    sch = columns_alone(scheduled(lambda: Behind(mlp())), "body.0").at["body.2"].rowwise()
    return sch.at["body.0"].sync("backward_post", _SumOfGradient.apply, gives="whole"), x()


def _placed(tensor, group):
    """Write a part at its rank's place into zeros of the whole size."""
    size = tensor.shape[-1]
    whole = tensor.new_zeros(*tensor.shape[:-1], size * group.num_ranks)
    whole[..., size * group.index : size * (group.index + 1)] = tensor
    return _Sum.apply(whole, group)


def _joined(tensor, group):
    """Join the parts of all ranks: only this rank's part has a gradient, which is the part of the gradient."""
    parts = [torch.empty_like(tensor) for _ in range(group.num_ranks)]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group.process_group)
    parts[group.index] = tensor
    return torch.cat(parts, -1)


def _joined_in_turn(tensor, group):
    """Join the parts of all ranks, this rank's first."""
    parts = [torch.empty_like(tensor) for _ in range(group.num_ranks)]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group.process_group)
    return torch.cat([tensor, *(parts[(group.index + step) % group.num_ranks] for step in range(1, group.num_ranks))], -1)


def _gathered_by(function, **said):
    sch = scheduled(lambda: Behind(mlp())).at["body.0"].colwise()
    return sch.at["body.1"].sync("forward_post", function, **said), x()


@right("a gather made of a sum of parts, each at its rank's place among zeros")
def placed():
    return _gathered_by(_placed, gives="whole", axis=-1)


@right("a gather of the user's own, each rank's gradient its part")
def joined():
    return _gathered_by(_joined, gives="whole", axis=-1)


@wrong("a gather of the user's own that begins with each rank's own part", where="body.1")
def joined_in_turn():
    return _gathered_by(_joined_in_turn)


@wrong("a gather of the user's own before a split layer, each rank's gradient its part", where="body.0")
def joined_before_a_split_layer():
    """Each rank's features of the split layer give a gradient to all parts, and nobody sums them."""
    layers = [nn.Linear(12, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, 12)]
    sch = scheduled(lambda: Behind(nn.Sequential(*layers))).at["body.0"].colwise()
    sch = sch.at["body.1"].sync("forward_post", _joined, axis=-1, gives="whole")
    return columns_alone(sch, "body.2").at["body.4"].rowwise(), x()
