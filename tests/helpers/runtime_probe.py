"""Measure the tensors that a runtime keeps and the messages that it sends, from outside: live tensors and collectives."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_OPS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "c10d::send": "send",
}
_FEW = 4
"""Norms, losses, overflows and sizes of a batch are messages of so few numbers at most."""
_SHAPES = ((256,), torch.int32)
"""What DeepSpeed tells of shapes ahead of each message between stages."""


def storages(tensors):
    """The bytes of each storage, by its address."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def nested(value):
    """The tensors in lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from nested(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from nested(item)


def live():
    """The storages of all tensors that Python knows of."""
    gc.collect()
    return storages(found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter))


class Messages(TorchDispatchMode):
    """The messages that this rank sends in the block: bytes by op and ranks of the group; small numbers are left out.

    ``on_call`` is called with the op and the storages of each message before it is sent. Of the operators that a plan puts
    into the model those are counted that sum over the ranks ``sums``.
    """

    def __init__(self, on_call, sums=()):
        super().__init__()
        self.sent, self.on_call, self.sums = Counter(), on_call, sums

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "shardplan::all_reduce":
            tensor, name = args
            ranks = tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name)))
            self.sent["all_reduce", ranks] += tensor.nbytes * (ranks == self.sums)
        if func.namespace == "c10d" and func._schema.name not in {"c10d::recv_", "c10d::barrier"}:
            tensors = list(nested(args))
            if max(tensor.numel() for tensor in tensors) > _FEW and (tuple(tensors[0].shape), tensors[0].dtype) != _SHAPES:
                op, size = _OPS[func._schema.name], max(tensor.nbytes for tensor in tensors)
                ranks = "pair" if op == "send" else _ranks(args)
                if len(ranks) > 1:
                    self.sent[op, ranks] += size
                self.on_call(op, storages(tensors))
        return func(*args, **(kwargs or {}))


def _ranks(args):
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(argument)
            except RuntimeError:  # another object, such as the kind of sum
                continue
            return tuple(dist.get_process_group_ranks(group))
    raise AssertionError(args)


def kinds(built):
    """The storages that training keeps, by kind, each once."""
    engine, basic = built.model, getattr(built.model, "basic_optimizer", built.optimizer)
    outer = getattr(engine, "optimizer", None)
    parameters = [parameter for module in built.modules for parameter in module.parameters()]
    found = {
        "parameters": storages([*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]),
        "buffers": storages(buffer for module in built.modules for buffer in module.buffers()),
        "states": storages(nested(dict(basic.state)) if basic else ()),
        "masters": _held(outer, *_MASTERS),
        "buckets": storages(nested([bucket.buffer for bucket in getattr(outer, "ipg_buckets", {}).values()])),
        "gradients": _held(outer, *_GRADIENTS) | storages(parameter.grad for parameter in parameters),
    }
    known = {}
    for kind, some in found.items():
        found[kind] = {address: size for address, size in some.items() if address not in known}
        known |= some
    return found


_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups", "fp32_groups_flat_partition")
_GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grads_in_partition",
    "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
)
"""Attributes of DeepSpeed's optimizers."""


def _held(owner, *names):
    return storages(nested([getattr(owner, name, None) for name in names]))


def crossing(built, place):
    """The storages of what crosses between stages and of what stages gave, by kind."""
    model = built.model
    if hasattr(model, "pipe_buffers"):
        cells = (cell.cell_contents for cell in model._allocate_or_extend_buffers.__closure__)
        inputs = list(nested(model.pipe_buffers["inputs"])) if place else []
        return {
            "received": storages(nested([cell for cell in cells if isinstance(cell, dict)])),
            "inputs": storages(inputs),
            "their gradients": storages(tensor.grad for tensor in inputs),
            "outputs": storages(nested([model.pipe_buffers["outputs"], model.pipe_buffers["output_tensors"]])),
        }
    stages = [stage for s in model._schedules.values() for stage in getattr(s, "_stages", None) or [s._stage]]
    received = [info for stage in stages for some in stage.args_recv_info.values() for info in some]
    returned = [info for stage in stages for some in stage.grad_recv_info.values() for info in some]
    return {
        "received": storages(getattr(info, "buffer", None) for info in (*received, *returned)),
        "outputs": storages(nested([given for stage in stages for given, _ in stage.fwd_cache.values()])),
    }
