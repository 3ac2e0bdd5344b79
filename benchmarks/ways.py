"""The ways from a model on meta to local shards with values; each leaves them on one rank and returns them by path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import deepspeed
import torch
import torch.distributed as dist
from attrs import frozen
from deepspeed import zero
from models import Case, holders, initialise, own, tensors
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.specs import Mesh, Plan

Shards = Mapping[str, Tensor]
"""Tensors by path; a DTensor or a parameter of ZeRO stands for its local part."""

STRATEGIES = ("local", "scatter", "broadcast")
"""Ways that are a strategy of shardplan."""


@frozen(eq=False)
class Way:
    """One way to local shards.

    Args:
        label: What the tables call it.
        about: What it does, in a line.
        run: Does it on this rank; the plan is there for strategies only.
        is_floor: Whether its values are meaningless, and only its time counts.
    """

    label: str
    about: str
    run: Callable[[Case, Plan | None], Shards]
    is_floor: bool = False


def plan_for(case: Case, num_ranks: int, way: str) -> Plan | None:
    """Return the plan of a strategy; None for other ways, which have none."""
    if way not in STRATEGIES:
        return None
    return plan_build(case.declare(create_schedule(case.model, Mesh(tensor=num_ranks))), strategy=way)


def planned(_: Case, plan: Plan | None) -> Shards:
    """Carry out a plan of shardplan."""
    assert plan is not None, "strategies have a plan"
    built = execute(plan, device="cpu", progress=False)
    return tensors(built.model)


def classic(case: Case, _: Plan | None) -> Shards:
    """All ranks allocate every tensor, the first makes it, all get it whole and keep a copy of their slice."""
    for path, module in holders(case.model):
        module.to_empty(device="cpu", recurse=False)
        if dist.get_rank() == 0:
            initialise(case.model, module)
        for _name, tensor in own(module):
            dist.broadcast(tensor.detach(), src=0)
        _keep_slices(case, path, module)
    return tensors(case.model)


def same_seed(case: Case, _: Plan | None) -> Shards:
    """All ranks make every tensor whole from one seed, and keep a copy of their slice."""
    for path, module in holders(case.model):
        module.to_empty(device="cpu", recurse=False)
        initialise(case.model, module)
        _keep_slices(case, path, module)
    return tensors(case.model)


def dtensor(case: Case, _: Plan | None) -> Shards:
    """Turn parameters into DTensors on meta, allocate their local parts, and run the model's init code on them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    for path, module in holders(case.model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            axis = case.axes.get(_join(path, name))
            placement = Replicate() if axis is None else Shard(axis)
            setattr(module, name, nn.Parameter(distribute_tensor(parameter, mesh, [placement])))
    return _allocate_and_initialise(case)


def fsdp2(case: Case, _: Plan | None) -> Shards:
    """Wrap each block and the model on meta, allocate local parts, and run the model's init code on them."""
    mesh: DeviceMesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in case.blocks(case.model):
        fully_shard(block, mesh=mesh)
    fully_shard(case.model, mesh=mesh)
    return _allocate_and_initialise(case)


def zero_init(case: Case, _: Plan | None) -> Shards:
    """Build the model within ``zero.Init``; values are those of the layers' constructors."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a build in C++
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    config = {"train_batch_size": dist.get_world_size(), "zero_optimization": {"stage": 3}}
    with zero.Init(config_dict_or_path=config):  # a dtype given here is not kept on CPUs; the config's is fp32
        model = case.build()
    return tensors(model)


def fill(case: Case, _: Plan | None) -> Shards:
    """Allocate the local shards and write a number into them."""
    return {path: _empty(case, path, tensor).fill_(0.5) for path, tensor in tensors(case.model).items()}


def normal(case: Case, _: Plan | None) -> Shards:
    """Allocate the local shards and let torch draw normal numbers into them."""
    return {path: _empty(case, path, tensor).normal_() for path, tensor in tensors(case.model).items()}


WAYS: Mapping[str, Way] = {
    "local": Way("shardplan `local`", "each rank makes its own parts", planned),
    "scatter": Way("shardplan `scatter`", "the first rank makes a tensor, each gets its part", planned),
    "broadcast": Way("shardplan `broadcast`", "the first rank makes a tensor, each gets all and slices", planned),
    "classic": Way(
        "classic", "all allocate, the first makes, broadcast tensor by tensor, each keeps a copy of its slice", classic
    ),
    "same_seed": Way("same seed", "all make every tensor whole from one seed, each copies its slice", same_seed),
    "dtensor": Way("DTensor", "`distribute_tensor` on meta, `to_empty`, the model's init code on DTensors", dtensor),
    "fsdp2": Way("FSDP2", "`fully_shard` on meta a layer, `to_empty`, the model's init code on DTensors", fsdp2),
    "zero_init": Way("`zero.Init`", "DeepSpeed stage 3; values of the layers' constructors, not of the model", zero_init),
    "fill": Way("floor: `fill_`", "the local shards, allocated and filled with a number", fill, is_floor=True),
    "normal": Way("floor: `normal_`", "the local shards, allocated and drawn by torch, wrong values", normal, is_floor=True),
}


def local_part(case: Case, path: str, tensor: Tensor) -> tuple[Tensor, int | None]:
    """Return what this rank holds of a tensor, and the axis along which ranks are put together; None if it is whole."""
    if isinstance(tensor, DTensor):
        (placement,) = tensor.placements
        return tensor.to_local().detach(), placement.dim if isinstance(placement, Shard) else None
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor.detach(), 0
    return tensor.detach(), case.axes.get(path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _keep_slices(case: Case, path: str, module: nn.Module) -> None:
    for name, tensor in list(own(module)):
        axis = case.axes.get(_join(path, name))
        if axis is not None:
            # a view would keep the whole alive
            part = (
                tensor.detach()
                .chunk(dist.get_world_size(), axis)[dist.get_rank()]
                .clone(memory_format=torch.contiguous_format)
            )
            setattr(module, name, nn.Parameter(part))


def _allocate_and_initialise(case: Case) -> Shards:
    case.model.to_empty(device="cpu")
    for _path, module in holders(case.model):
        initialise(case.model, module)
    return tensors(case.model)


def _empty(case: Case, path: str, tensor: Tensor) -> Tensor:
    shape, axis = list(tensor.shape), case.axes.get(path)
    if axis is not None:
        shape[axis] //= dist.get_world_size()
    return torch.empty(shape, dtype=tensor.dtype, device="cpu")
