"""Tensor ranks beside data ranks: sums along the wrong mesh axis, and tensors that are split over data."""

from __future__ import annotations

import torch
from torch import nn

from shardplan.specs import Mesh

from .blocks import WIDE, WIDTH, Behind, mlp, scheduled, split_mlp, x
from .entry import right, wrong

BOTH, DATA = Mesh(data=2, tensor=2), Mesh(data=2)


def _plain(mesh=BOTH):
    return scheduled(lambda: Behind(mlp(bias=False)), mesh)


@right("data ranks and whole tensors")
def data_alone():
    return scheduled(lambda: Behind(mlp()), DATA), x(4)


@right("data ranks and tensor ranks")
def data_and_tensor():
    return split_mlp(scheduled(lambda: Behind(mlp()), BOTH), "body."), x(4)


@wrong("outputs of a row split summed over data", where="body.2")
def summed_over_data():
    sch = _plain().at["body.0"].colwise().at["body.2"].shard("weight", axis=1).set(in_features=WIDE // 2)
    return sch.sync("forward_post", "all_reduce", mesh_axis="data"), x(4)


@wrong("gradient behind a column split summed over data", where="first")
def gradient_summed_over_data():
    sch = (
        _plain().at["body.0.{weight,bias}"].shard(axis=0).at["body.0"].sync("backward_post", "all_reduce", mesh_axis="data")
    )
    return sch.set(out_features=WIDE // 2).at["body.2"].rowwise(), x(4)


@wrong("tensors split over data as if its ranks had equal inputs", where="body.2")
def split_over_data():
    sch = _plain(DATA).at["body.0.{weight,bias}"].shard(axis=0, mesh_axis="data").at["body.0"].set(out_features=WIDE // 2)
    sch = sch.sync("backward_post", "all_reduce", mesh_axis="data")
    sch = sch.at["body.2"].shard("weight", axis=1, mesh_axis="data").set(in_features=WIDE // 2)
    return sch.sync("forward_post", "all_reduce", mesh_axis="data"), x(4)


@wrong("outputs averaged over data", where="first")
def averaged_over_data():
    sch = scheduled(lambda: Behind(mlp()), DATA).at["first"].sync("forward_post", "all_reduce", mesh_axis="data")
    return sch.sync("forward_post", "divide", mesh_axis="data"), x(4)


@wrong("gradient of a scale within split code summed over data", where="body.1")
def scale_summed_over_data():
    return _scale().at["body.1"].sum_gradient(mesh_axis="data"), x(4)


@right("gradient of a scale within split code summed over tensor")
def scale_summed_over_tensor():
    return _scale().at["body.1"].sum_gradient(), x(4)


class _Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6))

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        return (x.unflatten(-1, (-1, 6)) * self.weight).flatten(-2).tanh()


def _scale():
    def make():
        return Behind(nn.Sequential(nn.Linear(WIDTH, WIDE), _Scale(), nn.Linear(WIDE, WIDTH)))

    return scheduled(make, BOTH).at["body.0"].colwise().at["body.2"].rowwise()
