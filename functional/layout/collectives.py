"""The collective operators that tensor parallelism needs in a forward pass, each with its own autograd formula.

They are made with ``torch.library``, so that ``torch.export`` keeps them. Each takes its group as a name, which torch
resolves when it runs, and returns new memory, never a view. With x its input and g the gradient of its output:

===================  =======================================  ==========================================
operator             forward                                  backward
===================  =======================================  ==========================================
``all_reduce``       sum over the group                       g
``sum_gradient``     x                                        sum of g over the group
``sum_gradient_of``  x                                        sum of g over the group, for some entries of the last axis
``average_gradient`` x                                        sum of g over the group, divided by a number
``all_gather``       parts joined along an axis               own part of g
``gather_sum``       parts joined along an axis               sum of g, own part of it
``reduce_scatter``   sum, own part of it                      parts of g joined
``split``            own part along an axis                   parts of g joined
===================  =======================================  ==========================================

Parts that are gathered or split are equal, or as ``torch.chunk`` makes them: the last parts may be shorter. Padding at
their ends is left out, and comes back as zeros.

The pairs are Megatron-LM's f and g and their sequence-parallel variants (Shoeybi et al. 2019, section 3; Korthikanti
et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...specs.layout_steps import Sync


@frozen
class SyncGroup:
    """The ranks that a synchronisation spans.

    Args:
        name: torch's name of the process group; while planning, without process groups, ``""`` or the name of a mesh axis.
        num_ranks: Number of ranks.
        index: Place of this rank among them.
    """

    name: str
    num_ranks: int
    index: int

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group, for a user's function that calls ``torch.distributed`` itself."""
        return _process_group(self.name)


def sync_function(sync: Sync) -> Callable[[Tensor, SyncGroup], Tensor]:  # noqa: PLR0911  one case an operator
    """Return the operator that a synchronisation applies to a tensor in the forward pass.

    ``backward_post`` and ``backward_pre`` name the operator on the gradient, so the operator on the tensor is its adjoint:

    ==================  ====================  ================================  ==================
    when                ``all_reduce``        ``all_gather``                    ``reduce_scatter``
    ==================  ====================  ================================  ==================
    ``forward_pre``     ``all_reduce``        ``gather_sum``                    ``reduce_scatter``
    ``forward_post``    ``all_reduce``        ``all_gather``                    ``reduce_scatter``
    ``backward_*``      ``sum_gradient``      ``split``                         ``gather_sum``
    ==================  ====================  ================================  ==================
    """
    axis, features, sizes = sync.axis, sync.features, sync.sizes
    is_backward = sync.when in ("backward_pre", "backward_post")
    match sync.op:
        case "divide":
            return lambda x, group: x / group.num_ranks
        case "all_reduce" if is_backward and features is not None:
            return lambda x, group: sum_gradient_of(x, *features, group.name)
        case "all_reduce" if is_backward:
            return lambda x, group: sum_gradient(x, group.name)
        case "all_reduce":
            return lambda x, group: all_reduce(x, group.name)
        case "all_gather" if is_backward:
            return lambda x, group: take_part(x, _axis(x, axis), group, sizes)
        case "all_gather" if sync.when == "forward_post":
            return lambda x, group: gather_parts(x, _axis(x, axis), group, sizes)
        case "all_gather":
            return lambda x, group: gather_sum(x, _axis(x, axis), group.num_ranks, group.index, group.name)
        case _ if is_backward:
            assert sync.op == "reduce_scatter", "the schedule checks it"
            return lambda x, group: gather_sum(x, _axis(x, axis), group.num_ranks, group.index, group.name)
        case _:
            assert sync.op == "reduce_scatter", "the schedule checks it"
            return lambda x, group: reduce_scatter(x, _axis(x, axis), group.num_ranks, group.index, group.name)


def sent_by(operator: str, args: tuple[Any, ...]) -> tuple[str, int] | None:
    """Return the collective that the forward code of an operator issues, and the bytes of the whole tensor."""
    match operator, args:
        case "shardplan::all_reduce", (x, _):
            return "all_reduce", x.nbytes
        case "shardplan::gather_sum", (x, _, num, _, _):
            return "all_gather", num * x.nbytes
        case "shardplan::all_gather", (x, axis, num, _, part, _, _):
            # ranks with fewer entries send zeros in place of the missing entries
            shape = [part if at == axis else size for at, size in enumerate(x.shape)]
            return "all_gather", num * prod(shape) * x.element_size()
        case "shardplan::reduce_scatter", (x, _, _, _, _):
            return "reduce_scatter", x.nbytes
        case _:
            return None


def gather_parts(x: Tensor, axis: int, group: SyncGroup, sizes: tuple[int, int] | None) -> Tensor:
    """Join the parts of all ranks; ``sizes`` are the entries of the first rank and in all, None if all parts are equal."""
    part, size = sizes or (x.shape[axis], x.shape[axis] * group.num_ranks)
    return all_gather(x, axis, group.num_ranks, group.index, part, size, group.name)


def take_part(x: Tensor, axis: int, group: SyncGroup, sizes: tuple[int, int] | None) -> Tensor:
    """Keep this rank's part of a tensor that is equal on all ranks; ``sizes`` as in :func:`gather_parts`."""
    if sizes is None and x.shape[axis] % group.num_ranks:
        raise ValueError(_not_equal(x, axis, group.num_ranks))
    part = sizes[0] if sizes else x.shape[axis] // group.num_ranks
    length = min(part, max(0, x.shape[axis] - group.index * part)) if sizes else part
    return split(x, axis, group.num_ranks, group.index, part, length, group.name)


def _axis(x: Tensor, axis: int | None) -> int:
    assert axis is not None, "the schedule checks that a gather has an axis"
    return axis % x.dim()


def _process_group(name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)  # noqa: SLF001  as torch's own functional collectives do


def _gathered(x: Tensor, axis: int, num: int, group: str) -> Tensor:
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
        raise ValueError(_not_equal(x, axis, num))
    return x.split(x.shape[axis] // num, dim=axis)


def _not_equal(x: Tensor, axis: int, num: int) -> str:
    return f"axis {axis} of an activation of shape {list(x.shape)} cannot be split into {num} equal parts"


def _with_length(x: Tensor, axis: int, length: int) -> Tensor:
    """Return x with its axis cut, or padded with zeros, to a length."""
    missing = length - x.shape[axis]
    if missing > 0:
        return torch.cat([x, x.new_zeros([missing if at == axis else size for at, size in enumerate(x.shape)])], axis)
    return x.narrow(axis, 0, length)


def _resized(x: Tensor, axis: int, size: int) -> Tensor:
    return x.new_empty([size if at == axis else old for at, old in enumerate(x.shape)])


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


@torch.library.custom_op("shardplan::sum_gradient_of", mutates_args=())
def sum_gradient_of(x: Tensor, start: int, stop: int, group: str) -> Tensor:
    """Pass through; the gradient of some entries of the last axis is summed over the group."""
    return x.clone()


@torch.library.custom_op("shardplan::average_gradient", mutates_args=())
def average_gradient(x: Tensor, divide: int, group: str) -> Tensor:
    """Pass through; the gradient is summed over the group and divided by a number."""
    return x.clone()


@torch.library.custom_op("shardplan::all_gather", mutates_args=())
def all_gather(x: Tensor, axis: int, num: int, index: int, part: int, size: int, group: str) -> Tensor:
    """Join the parts of all ranks along an axis; the gradient is the own part.

    Args:
        x: The own part, of ``part`` entries along the axis, or fewer.
        axis: The axis.
        num: Number of ranks in the group.
        index: Place of this rank.
        part: Entries of the first rank.
        size: Entries of all ranks together, without the padding after them.
        group: Name of the group.
    """
    return _with_length(_gathered(_with_length(x, axis, part), axis, num, group), axis, size).contiguous()


@torch.library.custom_op("shardplan::gather_sum", mutates_args=())
def gather_sum(x: Tensor, axis: int, num: int, index: int, group: str) -> Tensor:
    """Join the parts of all ranks along an axis; the gradient is summed, and the own part of it kept."""
    return _gathered(x, axis, num, group)


@torch.library.custom_op("shardplan::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, axis: int, num: int, index: int, group: str) -> Tensor:
    """Sum over the group and keep the own part; the gradient's parts are joined."""
    return _summed_part(x, axis, num, index, group)


@torch.library.custom_op("shardplan::split", mutates_args=())
def split(x: Tensor, axis: int, num: int, index: int, part: int, length: int, group: str) -> Tensor:
    """Keep the own part along an axis, with zeros up to ``length``; the gradient's parts are joined.

    ``part`` is the number of entries of the first rank; the rest as for ``all_gather``.
    """
    start = min(index * part, x.shape[axis])
    own = x.narrow(axis, start, min(length, x.shape[axis] - start))
    return _with_length(own, axis, length).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("shardplan::own_ids", mutates_args=())
def own_ids(ids: Tensor, num_rows: int, index: int, group: str) -> Tensor:
    """Number the rows of an embedding from the first row of this rank."""
    return ids - index * num_rows


all_reduce.register_fake(lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format))
sum_gradient.register_fake(lambda x, group: torch.empty_like(x))
sum_gradient_of.register_fake(lambda x, start, stop, group: torch.empty_like(x))
average_gradient.register_fake(lambda x, divide, group: torch.empty_like(x))
all_gather.register_fake(lambda x, axis, num, index, part, size, group: _resized(x, axis, size))
gather_sum.register_fake(lambda x, axis, num, index, group: _longer(x, axis, num))
reduce_scatter.register_fake(lambda x, axis, num, index, group: _shorter(x, axis, num, index))
own_ids.register_fake(lambda ids, num_rows, index, group: torch.empty_like(ids))
split.register_fake(lambda x, axis, num, index, part, length, group: _resized(x, axis, length))


def _summed_of(grad: Tensor, start: int, stop: int, group: str) -> Tensor:
    out = grad.clone(memory_format=torch.contiguous_format)
    out[..., start:stop] = all_reduce(grad[..., start:stop], group)
    return out


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments, ctx.shape = inputs[1:], inputs[0].shape


def _backward(gradient: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient(grad, ctx.shape, *ctx.arguments), *(None for _ in ctx.arguments))

    return backward


for _op, _gradient in (
    (all_reduce, lambda grad, shape, group: grad),
    (sum_gradient, lambda grad, shape, group: all_reduce(grad, group)),
    (sum_gradient_of, lambda grad, shape, start, stop, group: _summed_of(grad, start, stop, group)),
    (average_gradient, lambda grad, shape, divide, group: all_reduce(grad, group) / divide),
    (
        all_gather,
        lambda grad, shape, axis, num, index, part, size, group: split(grad, axis, num, index, part, shape[axis], group),
    ),
    (gather_sum, lambda grad, shape, *rest: reduce_scatter(grad, *rest)),
    (
        reduce_scatter,
        lambda grad, shape, axis, num, index, group: all_gather(
            grad, axis, num, index, grad.shape[axis], shape[axis], group
        ),
    ),
    (
        split,
        lambda grad, shape, axis, num, index, part, length, group: all_gather(
            grad, axis, num, index, part, shape[axis], group
        ),
    ),
):
    _op.register_autograd(_backward(_gradient), setup_context=_keep_arguments)
