"""What DeepSpeed keeps for training, by the code of its release 0.19.8 (deepspeed/runtime)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from attrs import evolve

from ....specs.dtypes import num_bytes
from ..accounting.local_parameters import LocalParameter, backward_order, local_parameters, total_bytes, total_numel
from ..accounting.optimizer import num_states, step_bytes
from ..accounting.records import State
from .buckets import closed_after, closed_before
from .zero_config import ALL_REDUCE_NUMEL, Zero

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan

_ALIGNMENT = 2
"""Elements at whose multiples each partition begins: ``nccl_start_alignment_factor`` in runtime/zero/stage_1_and_2.py and
runtime/bf16_optimizer.py."""


def deepspeed_state(plan: Plan, coordinate: Coordinate) -> State:
    """Return what DeepSpeed keeps on one rank."""
    zero = Zero.of(plan)
    parameters = local_parameters(plan, coordinate, zero.half)
    trained = [parameter for parameter in parameters if parameter.is_trained and parameter.numel]
    if not trained:
        return State(parameter_bytes=total_bytes(parameters))
    match zero.wrapper:
        case "none" | "half":
            return _whole(plan, zero, parameters, trained)
        case "bf16" | "zero":
            return _flat(plan, zero, coordinate, parameters, trained)
        case "zero3":
            return _partitioned(plan, zero, parameters, trained)


def heaviest(plan: Plan, coordinate: Coordinate, places: range) -> Coordinate:
    """Return the coordinate that keeps the most of those at some places along ``data`` whose tensors are alike.

    They differ under ZeRO 2, where a rank keeps whole gradients of all parameters that it has a part of.
    """
    zero = Zero.of(plan)
    trained = [p for p in local_parameters(plan, coordinate, zero.half) if p.is_trained and p.numel]
    if zero.wrapper != "zero" or zero.stage == 1 or not trained or _is_compact(zero, trained[0].dtype):
        return coordinate
    part = flat_numel(trained, coordinate.mesh.data) // coordinate.mesh.data
    ends = list(accumulate(parameter.numel for parameter in trained))
    place = max(places, key=lambda place: _met_bytes(zero, trained[0].dtype, ends, part, place))
    return evolve(coordinate, data=place)


def flat_numel(trained: Sequence[LocalParameter], num_ranks: int) -> int:
    """Return the elements of the flat buffer that ZeRO 1 and 2 put the trained parameters into, padding at its end."""
    return _up_to(total_numel(trained), _ALIGNMENT * num_ranks)


def partition_numel(numel: int, num_ranks: int) -> int:
    """Return the elements of one rank's part of a parameter under ZeRO 3, which pads each on its own.

    ``_padding_size`` in runtime/zero/partition_parameters.py.
    """
    return -(-numel // num_ranks)


def persistent(zero: Zero, parameters: Sequence[LocalParameter]) -> list[LocalParameter]:
    """Return what ZeRO 3 keeps whole: ``mark_persistent_parameters`` in runtime/zero/parameter_offload.py."""
    kept: list[LocalParameter] = []
    for parameter in parameters:
        limit = zero.most_persistent_numel
        if parameter.numel <= zero.persistent_numel and (limit is None or parameter.numel + total_numel(kept) <= limit):
            kept.append(parameter)
    return kept


def _whole(plan: Plan, zero: Zero, parameters: Sequence[LocalParameter], trained: Sequence[LocalParameter]) -> State:
    """ZeRO 0: everything whole; with bf16 or fp16 the optimizer works on float32 copies (fp16/unfused_optimizer.py)."""
    masters = 4 * total_numel(trained) if zero.wrapper == "half" else 0
    worked_on = masters or total_bytes(trained)
    return State(
        parameter_bytes=total_bytes(parameters),
        gradient_bytes=total_bytes(trained),
        optimizer_bytes=num_states(plan) * worked_on + step_bytes(plan) * len(trained),
        master_bytes=masters,
        bucket_bytes=_flattened_bytes(zero, trained),
    )


def _flattened_bytes(zero: Zero, trained: Sequence[LocalParameter]) -> int:
    """What ``allreduce_bucket`` (runtime/engine.py) copies at one time: one tensor alone is not copied, another dtype is."""
    most = 0
    for dtype in {parameter.dtype for parameter in trained}:
        for bucket in closed_after([p.numel for p in trained if p.dtype == dtype], ALL_REDUCE_NUMEL):
            flattened = num_bytes(dtype) if len(bucket) > 1 else 0
            converted = num_bytes(zero.communicate) if zero.communicate != dtype else 0
            most = max(most, sum(bucket) * (flattened + converted))
    return most


def _flat(
    plan: Plan,
    zero: Zero,
    coordinate: Coordinate,
    parameters: Sequence[LocalParameter],
    trained: Sequence[LocalParameter],
) -> State:
    """ZeRO 1 and 2: trained parameters in one flat buffer, of which a rank has a float32 copy of its part."""
    num_ranks = coordinate.mesh.data
    padded = flat_numel(trained, num_ranks)
    part = padded // num_ranks
    frozen = total_bytes(parameters) - total_bytes(trained)
    dtype = trained[0].dtype
    if zero.wrapper == "bf16":
        gradients = padded * num_bytes(zero.accumulate)
        gradients += total_bytes(p for p in trained if p.has_gradient) if zero.keeps_half_gradients else 0
        buckets = padded * num_bytes(zero.communicate) if zero.communicate != zero.accumulate else 0
    else:
        gradients = _zero_gradient_bytes(zero, coordinate, trained, part)
        buckets = _zero_bucket_bytes(zero, trained, part, dtype)
    return State(
        parameter_bytes=padded * num_bytes(dtype) + frozen,
        gradient_bytes=gradients,
        optimizer_bytes=num_states(plan) * part * 4 + step_bytes(plan),
        master_bytes=part * 4,
        bucket_bytes=buckets,
    )


def _zero_gradient_bytes(zero: Zero, coordinate: Coordinate, trained: Sequence[LocalParameter], part: int) -> int:
    """ZeRO 1: whole gradients until the step. ZeRO 2: those of all parameters that the rank has a part of, whole.

    ``copy_grads_in_partition`` and ``get_flat_partition`` in runtime/zero/stage_1_and_2.py; where gradients are accumulated
    in float32 and parameters are not, ``_build_compact_grad_partition_buffer`` keeps the part alone.
    """
    dtype = trained[0].dtype
    if zero.stage == 1:
        return sum(p.numel for p in trained if p.has_gradient) * num_bytes(zero.accumulate)
    if _is_compact(zero, dtype):
        return part * num_bytes(zero.accumulate)
    return _met_bytes(zero, dtype, list(accumulate(p.numel for p in trained)), part, coordinate.data)


def _met_bytes(zero: Zero, dtype: str, ends: Sequence[int], part: int, place: int) -> int:
    """Return the bytes of all parameters of which a place along ``data`` has a part, and of the padding there."""
    start, stop = place * part, (place + 1) * part
    first = bisect_right(ends, start)
    last = min(bisect_left(ends, stop), len(ends) - 1)
    within = ends[last] - (ends[first - 1] if first else 0) if first <= last else 0
    padding = max(0, stop - max(ends[-1], start))
    return within * num_bytes(dtype) + padding * num_bytes(zero.accumulate)


def _zero_bucket_bytes(zero: Zero, trained: Sequence[LocalParameter], part: int, dtype: str) -> int:
    """The buckets that ``setup_buckets`` allocates, and the copy that ``allreduce_bucket`` makes of one.

    A bucket that lies in the part of one rank alone is sent as it is (``average_tensor`` in runtime/zero/stage_1_and_2.py).
    """
    held = num_bytes(zero.accumulate if zero.stage == 1 else dtype)
    starts: list[int] = [0]
    for parameter in trained:
        starts.append(starts[-1] + parameter.numel)
    pairs = [(start, p.numel) for start, p in zip(starts, trained, strict=False)]
    pairs = pairs if zero.stage == 1 else pairs[::-1]  # ZeRO 2 sends what the backward pass gives, the last layer first
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


def _partitioned(plan: Plan, zero: Zero, parameters: Sequence[LocalParameter], trained: Sequence[LocalParameter]) -> State:
    """ZeRO 3: each parameter in parts, small ones whole besides; gradients and float32 copies of the parts (stage3.py)."""
    num_ranks = plan.mesh.data
    parts = sum(partition_numel(p.numel, num_ranks) * num_bytes(p.dtype) for p in parameters)
    kept = persistent(zero, parameters) if num_ranks > 1 else []
    whole = sum(partition_numel(p.numel, num_ranks) * num_ranks * num_bytes(p.dtype) for p in kept)
    numels = [partition_numel(p.numel, num_ranks) for p in trained]
    return State(
        parameter_bytes=parts + whole,
        gradient_bytes=sum(numels) * num_bytes(zero.accumulate),
        optimizer_bytes=num_states(plan) * sum(numels) * 4
        + step_bytes(plan) * len(_sub_groups(numels, zero.sub_group_numel)),
        master_bytes=sum(numels) * 4,
        bucket_bytes=_scattered_bytes(zero, trained, num_ranks),
    )


def _sub_groups(numels: Sequence[int], limit: int) -> list[int]:
    """Return the elements of each tensor that the optimizer works on: ``_create_fp16_sub_groups`` in stage3.py."""
    groups = [0]
    for numel in numels:
        if groups[-1] >= limit:
            groups.append(0)
        groups[-1] += numel
    return groups


def _scattered_bytes(zero: Zero, trained: Sequence[LocalParameter], num_ranks: int) -> int:
    """The bucket, and the copy with padding that ``reduce_scatter_coalesced`` (runtime/comm) makes of it."""
    copied = 0
    for bucket in closed_before([p.numel for p in backward_order(trained)], zero.bucket_numel):
        is_copied = zero.scatters and (len(bucket) > 1 or bucket[0] % num_ranks)
        copied = max(copied, sum(partition_numel(n, num_ranks) * num_ranks for n in bucket) if is_copied else 0)
    buffer = zero.bucket_numel if zero.is_contiguous else 0
    return (buffer + copied) * num_bytes(zero.communicate)


def _up_to(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
