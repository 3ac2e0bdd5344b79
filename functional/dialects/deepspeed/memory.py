"""Memory that DeepSpeed keeps for training, by the code of its release 0.19.8 (deepspeed/runtime)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from attrs import evolve

from ....specs.dtypes import num_bytes
from ..accounting.local_parameters import LocalParameter, backward_order, local_parameters, total_bytes, total_numel
from ..accounting.state import State
from ..accounting.training import UNKNOWN, Optimizer
from .boundaries import boundary_bytes
from .config import ALL_REDUCE_NUMEL, Zero, optimizer_of
from .partitions import closed_after, closed_before, flat_numel, partition_numel, persistent

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan


def deepspeed_state(plan: Plan, coordinate: Coordinate, alike: range | None) -> State:
    """Return the bytes that DeepSpeed keeps on a rank, or on the fullest rank at the places ``alike`` along ``data``.

    ZeRO 2 keeps whole gradients of all parameters that a rank's partition meets, which differ from rank to rank.
    Optimizer states and parameters that go to the host or to a disk (``offload_optimizer``, ``offload_param``) are counted
    as if they stayed on the device.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> tree = SpecTree([ParamSpec("weight", (16, 4), "float32")])
    >>> config = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_optimization": {"stage": 1}}
    >>> plan = Plan(mesh := Mesh(data=2), tree, (), target="deepspeed", config=config)
    >>> state = deepspeed_state(plan, mesh.coordinate(0), alike=None)
    >>> state.parameter_bytes, state.gradient_bytes, state.optimizer_bytes, state.master_bytes
    (256, 256, 128, 128)
    """
    zero, optimizer = Zero.of(plan), optimizer_of(plan) or UNKNOWN
    parameters = local_parameters(plan, coordinate, zero.half)
    trained = [parameter for parameter in parameters if parameter.is_trained and parameter.numel]
    boundary = boundary_bytes(plan, coordinate)
    if not trained:
        return State(parameter_bytes=total_bytes(parameters), boundary_bytes=boundary)
    match zero.wrapper:
        case "none" | "half":
            state = _whole(zero, optimizer, parameters, trained)
        case "bf16" | "zero":
            places = alike or range(coordinate.data, coordinate.data + 1)
            state = _flat(zero, optimizer, coordinate.mesh.data, places, parameters, trained)
        case "zero3":
            state = _partitioned(zero, optimizer, coordinate.mesh.data, parameters, trained)
    return evolve(state, boundary_bytes=boundary)


def _whole(
    zero: Zero, optimizer: Optimizer, parameters: Sequence[LocalParameter], trained: Sequence[LocalParameter]
) -> State:
    """ZeRO 0: everything whole; with bf16 or fp16 the optimizer works on float32 copies (fp16/unfused_optimizer.py)."""
    masters = 4 * total_numel(trained) if zero.wrapper == "half" else 0
    worked_on = masters or total_bytes(trained)
    return State(
        parameter_bytes=total_bytes(parameters),
        gradient_bytes=total_bytes(trained),
        optimizer_bytes=optimizer.state_bytes(worked_on, len(trained)),
        master_bytes=masters,
        bucket_bytes=_flattened_bytes(zero, trained),
    )


def _flattened_bytes(zero: Zero, trained: Sequence[LocalParameter]) -> int:
    """Return the bytes that ``allreduce_bucket`` (runtime/engine.py) copies at one time.

    A bucket of several tensors is flattened into a copy; where gradients are sent in another dtype it is converted too.
    """
    most = 0
    for dtype in {parameter.dtype for parameter in trained}:
        for bucket in closed_after([p.numel for p in trained if p.dtype == dtype], ALL_REDUCE_NUMEL):
            flattened = num_bytes(dtype) if len(bucket) > 1 else 0
            converted = num_bytes(zero.communicate) if zero.communicate != dtype else 0
            most = max(most, sum(bucket) * (flattened + converted))
    return most


def _flat(
    zero: Zero,
    optimizer: Optimizer,
    num_ranks: int,
    places: range,
    parameters: Sequence[LocalParameter],
    trained: Sequence[LocalParameter],
) -> State:
    """ZeRO 1 and 2: trained parameters in one flat buffer; each rank has a float32 copy of its partition."""
    padded = flat_numel(trained, num_ranks)
    part = padded // num_ranks
    frozen = total_bytes(parameters) - total_bytes(trained)
    dtype = trained[0].dtype
    if zero.wrapper == "bf16":
        gradients = padded * num_bytes(zero.accumulate)
        gradients += total_bytes(p for p in trained if p.has_gradient) if zero.keeps_half_gradients else 0
        buckets = padded * num_bytes(zero.communicate) if zero.communicate != zero.accumulate else 0
    else:
        gradients = _zero_gradient_bytes(zero, places, trained, part)
        buckets = _zero_bucket_bytes(zero, trained, part, dtype)
    return State(
        parameter_bytes=padded * num_bytes(dtype) + frozen,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer.state_bytes(part * 4, 1),
        master_bytes=part * 4,
        bucket_bytes=buckets,
    )


def _zero_gradient_bytes(zero: Zero, places: range, trained: Sequence[LocalParameter], part: int) -> int:
    """ZeRO 1: whole gradients until the step. ZeRO 2: whole gradients of all parameters that the rank's partition meets.

    ``copy_grads_in_partition`` and ``get_flat_partition`` in runtime/zero/stage_1_and_2.py; where gradients are accumulated
    in float32 and parameters are not, ``_build_compact_grad_partition_buffer`` keeps gradients of the partition alone.
    """
    dtype = trained[0].dtype
    if zero.stage == 1:
        return sum(p.numel for p in trained if p.has_gradient) * num_bytes(zero.accumulate)
    if _is_compact(zero, dtype):
        return part * num_bytes(zero.accumulate)
    ends = list(accumulate(p.numel for p in trained))
    return max(_met_bytes(zero, dtype, ends, part, place) for place in places)


def _met_bytes(zero: Zero, dtype: str, ends: Sequence[int], part: int, place: int) -> int:
    """Return the bytes of all parameters that the partition of a place along ``data`` meets, and of the padding there."""
    start, stop = place * part, (place + 1) * part
    first = bisect_right(ends, start)
    last = min(bisect_left(ends, stop), len(ends) - 1)
    within = ends[last] - (ends[first - 1] if first else 0) if first <= last else 0
    padding = max(0, stop - max(ends[-1], start))
    return within * num_bytes(dtype) + padding * num_bytes(zero.accumulate)


def _zero_bucket_bytes(zero: Zero, trained: Sequence[LocalParameter], part: int, dtype: str) -> int:
    """Return the bytes of the buckets that ``setup_buckets`` allocates, and of the copy that ``allreduce_bucket`` makes.

    A bucket that lies in a single rank's partition is sent as it is (``average_tensor`` in runtime/zero/stage_1_and_2.py).
    """
    held = num_bytes(zero.accumulate if zero.stage == 1 else dtype)
    starts: list[int] = [0]
    for parameter in trained:
        starts.append(starts[-1] + parameter.numel)
    pairs = [(start, p.numel) for start, p in zip(starts, trained, strict=False)]
    pairs = pairs if zero.stage == 1 else pairs[::-1]  # ZeRO 2 sends gradients as they come, the last layer first
    copied = 0
    taken = iter(pairs)
    for bucket in closed_before([numel for _, numel in pairs], zero.bucket_numel):
        members = [next(taken) for _ in bucket]
        parts = {place for start, numel in members for place in range(start // part, (start + numel - 1) // part + 1)}
        is_cut = len(parts) > 1 or (len(members) > 1 and _is_compact(zero, dtype))
        copied = max(copied, sum(bucket) if is_cut else 0)
    converted = num_bytes(zero.communicate) if num_bytes(zero.communicate) != held else 0
    buffers = zero.num_buckets * zero.bucket_numel * held if zero.is_contiguous else 0
    return buffers + copied * (held + converted)


def _is_compact(zero: Zero, dtype: str) -> bool:
    return zero.accumulate == "float32" and dtype != "float32"


def _partitioned(
    zero: Zero,
    optimizer: Optimizer,
    num_ranks: int,
    parameters: Sequence[LocalParameter],
    trained: Sequence[LocalParameter],
) -> State:
    """ZeRO 3: partitions of each parameter, of their gradients and of float32 copies; small parameters also whole."""
    parts = sum(partition_numel(p.numel, num_ranks) * num_bytes(p.dtype) for p in parameters)
    kept = persistent(zero, parameters) if num_ranks > 1 else []
    whole = sum(partition_numel(p.numel, num_ranks) * num_ranks * num_bytes(p.dtype) for p in kept)
    numels = [partition_numel(p.numel, num_ranks) for p in trained]
    return State(
        parameter_bytes=parts + whole,
        gradient_bytes=sum(numels) * num_bytes(zero.accumulate),
        optimizer_bytes=optimizer.state_bytes(sum(numels) * 4, len(_sub_groups(numels, zero.sub_group_numel))),
        master_bytes=sum(numels) * 4,
        bucket_bytes=_scattered_bytes(zero, trained, num_ranks),
    )


def _sub_groups(numels: Sequence[int], limit: int) -> list[int]:
    """Return the elements of each tensor that the optimizer works on: ``_create_fp16_sub_groups`` in zero/stage3.py."""
    groups = [0]
    for numel in numels:
        if groups[-1] >= limit:
            groups.append(0)
        groups[-1] += numel
    return groups


def _scattered_bytes(zero: Zero, trained: Sequence[LocalParameter], num_ranks: int) -> int:
    """Return the bytes of ZeRO 3's bucket, and of the padded copy that ``reduce_scatter_coalesced`` (runtime/comm) makes."""
    copied = 0
    for bucket in closed_before([p.numel for p in backward_order(trained)], zero.bucket_numel):
        is_copied = zero.scatters and (len(bucket) > 1 or bucket[0] % num_ranks)
        copied = max(copied, sum(partition_numel(n, num_ranks) * num_ranks for n in bucket) if is_copied else 0)
    buffer = zero.bucket_numel if zero.is_contiguous else 0
    return (buffer + copied) * num_bytes(zero.communicate)
