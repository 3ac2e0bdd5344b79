"""What DeepSpeed sends over ``data`` in a training step, by the code of its release 0.19.8 (deepspeed/runtime)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ....specs.dtypes import num_bytes
from ..accounting.local_parameters import LocalParameter, backward_order, local_parameters, total_numel
from ..accounting.microbatches import num_microbatches
from ..accounting.records import Reduction
from .buckets import closed_after, closed_before
from .gathers import gathered_in_passes
from .memory import flat_numel, partition_numel, persistent
from .zero_config import ALL_REDUCE_NUMEL, Zero

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan


def deepspeed_reductions(plan: Plan, coordinate: Coordinate) -> Iterator[Reduction]:
    """Iterate over what one rank sends over ``data``."""
    zero, num_ranks = Zero.of(plan), plan.mesh.data
    parameters = local_parameters(plan, coordinate, zero.half)
    trained = [parameter for parameter in parameters if parameter.is_trained and parameter.numel]
    if num_ranks == 1 or not trained:
        return
    sent = num_bytes(zero.communicate)
    match zero.wrapper:
        case "none" | "half":
            numels = [[p.numel for p in trained if p.dtype == dtype] for dtype in dict.fromkeys(p.dtype for p in trained)]
            calls = sum(len(list(closed_after(some, ALL_REDUCE_NUMEL))) for some in numels)
            yield Reduction("data", "gradients", "all_reduce", calls, total_numel(trained) * sent)
        case "bf16":
            flat = flat_numel(trained, num_ranks)
            yield Reduction("data", "gradients", "all_reduce", 1, flat * sent)
            yield Reduction("data", "parameters", "all_gather", 1, flat * num_bytes(trained[0].dtype))
        case "zero":
            yield from _buckets(plan, zero, trained)
            flat = flat_numel(trained, num_ranks)
            yield Reduction("data", "parameters", "all_gather", 1, flat * num_bytes(trained[0].dtype))
        case "zero3":
            yield from _scattered(plan, zero, trained)
            yield from _gathered(plan, zero, parameters)


def _buckets(plan: Plan, zero: Zero, trained: Sequence[LocalParameter]) -> Iterator[Reduction]:
    """ZeRO 1 reduces once a step, ZeRO 2 each micro-batch (``allreduce_gradients`` in runtime/engine.py).

    Both by an all-reduce of a bucket with what each rank needs of it (``average_tensor`` in runtime/zero/stage_1_and_2.py).
    """
    reduced = [p.numel for p in trained if p.has_gradient]
    times = 1 if zero.stage == 1 else num_microbatches(plan)
    calls = len(list(closed_before(reduced if zero.stage == 1 else reduced[::-1], zero.bucket_numel)))
    yield Reduction("data", "gradients", "all_reduce", times * calls, times * sum(reduced) * num_bytes(zero.communicate))


def _scattered(plan: Plan, zero: Zero, trained: Sequence[LocalParameter]) -> Iterator[Reduction]:
    """ZeRO 3 reduces and scatters each micro-batch (``__avg_scatter_grads`` in runtime/zero/stage3.py)."""
    reduced, num_ranks = [p.numel for p in backward_order(trained) if p.has_gradient], plan.mesh.data
    times = num_microbatches(plan)
    calls = len(list(closed_before(reduced, zero.bucket_numel)))
    scatters = zero.scatters or not zero.is_contiguous
    numel = sum(partition_numel(n, num_ranks) * num_ranks if scatters else n for n in reduced)
    op = "reduce_scatter" if scatters else "all_reduce"
    yield Reduction("data", "gradients", op, times * calls, times * numel * num_bytes(zero.communicate))


def _gathered(plan: Plan, zero: Zero, parameters: Sequence[LocalParameter]) -> Iterator[Reduction]:
    """ZeRO 3 gathers what stays whole after the step, the rest in the passes of each micro-batch."""
    num_ranks = plan.mesh.data
    kept = persistent(zero, parameters)
    rest = {p.spec.path: p for p in parameters if p not in kept}
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        for path in parameter.spec.paths:
            modules.setdefault(path.rpartition(".")[0], []).append(parameter.spec.path)
    numels = {p.spec.path: p.numel for p in parameters}
    passes = [rest[path] for path in gathered_in_passes(numels, modules.values(), zero.reuse_numel) if path in rest]
    times = num_microbatches(plan)

    def size(some: Sequence[LocalParameter]) -> int:
        return sum(partition_numel(p.numel, num_ranks) * num_ranks * num_bytes(p.dtype) for p in some)

    num_bytes_ = size(kept) + times * size(passes)
    yield Reduction("data", "parameters", "all_gather", len(kept) + times * len(passes), num_bytes_)
