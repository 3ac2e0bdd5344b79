"""The collective operators that tensor parallelism needs in a forward pass, each with its own autograd formula.

They are made with ``torch.library``, so that ``torch.export`` keeps them. Each names its group by a string, which torch
resolves when it runs, and gives new memory, never a view. With f the operator, g the gradient of its output:

===================  =======================================  ==========================================
operator             forward                                  backward
===================  =======================================  ==========================================
``all_reduce``       sum over the group                       g
``sum_gradient``     x                                        sum of g over the group
``all_gather``       parts joined along an axis               own part of g
``gather_sum``       parts joined along an axis               sum of g, own part of it
``reduce_scatter``   sum, own part of it                      parts of g joined
``split``            own part along an axis                   parts of g joined
===================  =======================================  ==========================================

The pairs are Megatron-LM's f and g and their sequence-parallel variants (Shoeybi et al. 2019, section 3; Korthikanti
et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..specs.steps import When


@frozen
class SyncGroup:
    """The ranks that a synchronisation spans.

    Args:
        name: torch's name of the process group; ``""`` while planning, when there is none.
        num_ranks: Ranks in it.
        index: Place of this rank in it.
    """

    name: str
    num_ranks: int
    index: int

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group, for a function of the user's that calls ``torch.distributed`` itself."""
        return _process_group(self.name)


def sync_function(when: When, op: str, axis: int | None) -> Callable[[Tensor, SyncGroup], Tensor]:  # noqa: PLR0911  one case an operator
    """Return what a synchronisation does to a tensor on its way forward.

    ``backward_post`` is said of the gradient, so its operator on the way forward is the adjoint:

    ==================  ====================  ================================  ==================
    said of             ``all_reduce``        ``all_gather``                    ``reduce_scatter``
    ==================  ====================  ================================  ==================
    ``forward_pre``     ``all_reduce``        ``gather_sum``                    ``reduce_scatter``
    ``forward_post``    ``all_reduce``        ``all_gather``                    ``reduce_scatter``
    ``backward_post``   ``sum_gradient``      ``split``                         ``gather_sum``
    ==================  ====================  ================================  ==================
    """
    match when, op:
        case "backward_post", "all_reduce":
            return lambda x, group: sum_gradient(x, group.name)
        case "backward_post", "reduce_scatter":
            return lambda x, group: gather_sum(x, _axis(x, axis), group.num_ranks, group.index, group.name)
        case "backward_post", "all_gather":
            return lambda x, group: split(x, _axis(x, axis), group.num_ranks, group.index, group.name)
        case _, "all_reduce":
            return lambda x, group: all_reduce(x, group.name)
        case "forward_pre", "all_gather":
            return lambda x, group: gather_sum(x, _axis(x, axis), group.num_ranks, group.index, group.name)
        case _, "all_gather":
            return lambda x, group: all_gather(x, _axis(x, axis), group.num_ranks, group.index, group.name)
        case _:
            assert op == "reduce_scatter", "the schedule checks it"
            return lambda x, group: reduce_scatter(x, _axis(x, axis), group.num_ranks, group.index, group.name)


def _axis(x: Tensor, axis: int | None) -> int:
    assert axis is not None, "the schedule checks that a gather has an axis"
    return axis % x.dim()


def _process_group(name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)  # noqa: SLF001  as torch's own functional collectives do


def _joined(x: Tensor, axis: int, num: int, group: str) -> Tensor:
    own = x.contiguous()
    parts = [torch.empty_like(own) for _ in range(num)]
    dist.all_gather(parts, own, group=_process_group(group))
    return torch.cat(parts, dim=axis)


def _summed_part(x: Tensor, axis: int, num: int, index: int, group: str) -> Tensor:
    parts = [part.contiguous() for part in _equal_parts(x, axis, num)]
    out = torch.empty_like(parts[index])
    dist.reduce_scatter(out, parts, group=_process_group(group))
    return out


def _equal_parts(x: Tensor, axis: int, num: int) -> tuple[Tensor, ...]:
    if x.shape[axis] % num:
        msg = f"axis {axis} of an activation of shape {list(x.shape)} cannot be split into {num} equal parts"
        raise ValueError(msg)
    return x.split(x.shape[axis] // num, dim=axis)


def _longer(x: Tensor, axis: int, num: int) -> Tensor:
    return x.new_empty([size * num if at == axis else size for at, size in enumerate(x.shape)])


def _shorter(x: Tensor, axis: int, num: int, index: int) -> Tensor:
    return x.new_empty(_equal_parts(x, axis, num)[index].shape)


@torch.library.custom_op("shardplan::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum over the group; the gradient passes through."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_process_group(group))
    return out


@torch.library.custom_op("shardplan::sum_gradient", mutates_args=())
def sum_gradient(x: Tensor, group: str) -> Tensor:
    """Pass through; the gradient is summed over the group."""
    return x.clone()


@torch.library.custom_op("shardplan::all_gather", mutates_args=())
def all_gather(x: Tensor, axis: int, num: int, index: int, group: str) -> Tensor:
    """Join the parts of all ranks along an axis; the gradient is the own part."""
    return _joined(x, axis, num, group)


@torch.library.custom_op("shardplan::gather_sum", mutates_args=())
def gather_sum(x: Tensor, axis: int, num: int, index: int, group: str) -> Tensor:
    """Join the parts of all ranks along an axis; the gradient is summed, and the own part of it kept."""
    return _joined(x, axis, num, group)


@torch.library.custom_op("shardplan::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, axis: int, num: int, index: int, group: str) -> Tensor:
    """Sum over the group and keep the own part; the gradient's parts are joined."""
    return _summed_part(x, axis, num, index, group)


@torch.library.custom_op("shardplan::split", mutates_args=())
def split(x: Tensor, axis: int, num: int, index: int, group: str) -> Tensor:
    """Keep the own part along an axis; the gradient's parts are joined."""
    return _equal_parts(x, axis, num)[index].clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("shardplan::own_ids", mutates_args=())
def own_ids(ids: Tensor, num_rows: int, index: int, group: str) -> Tensor:
    """Count the rows of an embedding from the first one that this rank has."""
    return ids - index * num_rows


all_reduce.register_fake(lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format))
sum_gradient.register_fake(lambda x, group: torch.empty_like(x))
all_gather.register_fake(lambda x, axis, num, index, group: _longer(x, axis, num))
gather_sum.register_fake(lambda x, axis, num, index, group: _longer(x, axis, num))
reduce_scatter.register_fake(lambda x, axis, num, index, group: _shorter(x, axis, num, index))
own_ids.register_fake(lambda ids, num_rows, index, group: torch.empty_like(ids))
split.register_fake(lambda x, axis, num, index, group: _shorter(x, axis, num, index))


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(gradient: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient(grad, *ctx.arguments), *(None for _ in ctx.arguments))

    return backward


for _op, _gradient in (
    (all_reduce, lambda grad, group: grad),
    (sum_gradient, all_reduce),
    (all_gather, split),
    (gather_sum, reduce_scatter),
    (reduce_scatter, all_gather),
    (split, all_gather),
):
    _op.register_autograd(_backward(_gradient), setup_context=_keep_arguments)
