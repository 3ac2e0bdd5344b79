"""Gathers and scatters along a wrong axis, on a wrong side, or with a wrong gradient, and functions of the user's own."""

from __future__ import annotations

import torch.distributed as dist

from .blocks import WIDE, Behind, mlp, scheduled, x
from .entry import right, wrong


def _gathered(when, path, axis=-1, **split):
    """Split the first layer's outputs, and gather them before the second layer, which is whole."""
    sch = scheduled(lambda: Behind(mlp())).at["body.0"].colwise(**split)
    return sch.at[path].sync(when, "all_gather", axis=axis), x()


@right("outputs gathered behind the layer that splits them")
def gathered():
    return _gathered("forward_post", "body.0")


@right("outputs gathered behind the activation")
def gathered_behind_the_activation():
    return _gathered("forward_post", "body.1")


@wrong("outputs gathered before a whole layer, as if it were split", where="body.0")
def gathered_before_a_whole_layer():
    """This gather sums its gradient, which the whole layer computes alike on all ranks."""
    return _gathered("forward_pre", "body.2")


@wrong("outputs gathered along tokens", where="body.0")
def gathered_along_tokens():
    return _gathered("forward_post", "body.0", axis=1)


@wrong("outputs split by blocks, gathered in the order of ranks", where="body.0")
def gathered_in_the_order_of_ranks():
    return _gathered("forward_post", "body.0", blocks=(WIDE // 2, WIDE // 2))


@right("a sum made of a scatter and a gather")
def scattered_and_gathered():
    sch = _split_without_a_sum()
    return sch.at["body.2"].sync("forward_post", "reduce_scatter", axis=-1).sync("forward_post", "all_gather", axis=-1), x()


@right("a sum made of a scatter and a gather, before a bias")
def scattered_and_gathered_before_a_bias():
    sch = scheduled(lambda: Behind(mlp())).at["body.0"].colwise().at["body.2"].rowwise(sequence_axis=0)
    return sch.sync("forward_post", "all_gather", axis=0), x(4)


@wrong("a sum scattered along features and gathered along tokens", where="body.2")
def gathered_along_another_axis():
    sch = _split_without_a_sum()
    sch = sch.at["body.2"].sync("forward_post", "reduce_scatter", axis=-1).sync("forward_post", "all_gather", axis=1)
    return sch, x()


@wrong("a sum scattered and never gathered", where="")
def never_gathered():
    return _split_without_a_sum().at["body.2"].sync("forward_post", "reduce_scatter", axis=-1), x()


def _split_without_a_sum():
    """Both layers are split, and nothing sums the outputs of the second."""
    sch = scheduled(lambda: Behind(mlp(bias=False))).at["body.0"].colwise()
    return sch.at["body.2"].shard("weight", axis=1).set(in_features=WIDE // 2)


def _sum(tensor, group):
    """Sum over ranks as a user may write it: the gradient passes."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group.process_group)
    return tensor + (total - tensor).detach()


def _sum_in_place(tensor, group):
    """Sum in a way that autograd does not see, and that loses the gradient."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group.process_group)
    return total


def _largest(tensor, group):
    """Keep the largest of all ranks' values, instead of their sum."""
    total = tensor.detach().clone()
    dist.all_reduce(total, dist.ReduceOp.MAX, group=group.process_group)
    return tensor + (total - tensor).detach()


@right("a sum by a function of the user's own")
def own_sum():
    return _split_without_a_sum().at["body.2"].sync("forward_post", _sum, gives="whole"), x()


@wrong("a sum by a function that loses the gradient", where="body.2")
def own_sum_without_gradient():
    return _split_without_a_sum().at["body.2"].sync("forward_post", _sum_in_place), x()


@wrong("a maximum over ranks in place of a sum", where="body.2")
def largest_in_place_of_the_sum():
    return _split_without_a_sum().at["body.2"].sync("forward_post", _largest), x()


def _on_the_first_rank_alone(tensor, group):
    return _sum(tensor, group) if group.index == 0 else tensor


@wrong("a sum that the second rank does not join", where="body.2")
def lopsided_sum():
    return _split_without_a_sum().at["body.2"].sync("forward_post", _on_the_first_rank_alone), x()
