"""Messages of a training step with DeepSpeed, by the code of its release 0.19.8 (deepspeed/runtime)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from ....specs.dtypes import num_bytes
from ....specs.paths import module_of
from ..accounting.local_parameters import LocalParameter, backward_order, local_parameters, total_numel
from ..accounting.messages import Messages, tied_sums
from .boundaries import boundary_messages
from .config import ALL_REDUCE_NUMEL, Zero, num_microbatches
from .partitions import closed_after, closed_before, flat_numel, partition_numel, persistent

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan


def deepspeed_messages(plan: Plan, coordinate: Coordinate) -> Iterator[Messages]:
    """Iterate over the messages of a step: tensors that cross, gradients, parameters that ZeRO gathers.

    Messages of a few numbers are left out: norms, overflows, losses, barriers.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> tree = SpecTree([ParamSpec("weight", (16, 4), "float32")])
    >>> plan = Plan(mesh := Mesh(data=2), tree, (), target="deepspeed", config={"zero_optimization": {"stage": 1}})
    >>> [(row.cargo, row.op, row.num_bytes) for row in deepspeed_messages(plan, mesh.coordinate(0))]
    [('gradients', 'all_reduce', 256), ('parameters', 'all_gather', 256)]
    """
    zero = Zero.of(plan)
    yield from boundary_messages(plan, coordinate)
    yield from _data_messages(plan, zero, coordinate)
    item_bytes = num_bytes(zero.accumulate) if zero.wrapper == "bf16" else None
    yield from tied_sums(plan, coordinate, cast_to=zero.half, item_bytes=item_bytes)


def _data_messages(plan: Plan, zero: Zero, coordinate: Coordinate) -> Iterator[Messages]:
    """Iterate over the messages over ``data``: gradients that are averaged, and parameters that are gathered."""
    num_ranks = plan.mesh.data
    parameters = local_parameters(plan, coordinate, zero.half)
    trained = [parameter for parameter in parameters if parameter.is_trained and parameter.numel]
    if num_ranks == 1 or not trained:
        return
    sent = num_bytes(zero.communicate)
    match zero.wrapper:
        case "none" | "half":
            numels = [[p.numel for p in trained if p.dtype == dtype] for dtype in dict.fromkeys(p.dtype for p in trained)]
            calls = sum(len(list(closed_after(some, ALL_REDUCE_NUMEL))) for some in numels)
            yield Messages("data", "gradients", "all_reduce", calls, total_numel(trained) * sent)
        case "bf16":
            flat = flat_numel(trained, num_ranks)
            yield Messages("data", "gradients", "all_reduce", 1, flat * sent)
            yield Messages("data", "parameters", "all_gather", 1, flat * num_bytes(trained[0].dtype))
        case "zero":
            yield from _buckets(plan, zero, trained)
            flat = flat_numel(trained, num_ranks)
            yield Messages("data", "parameters", "all_gather", 1, flat * num_bytes(trained[0].dtype))
        case "zero3":
            yield from _scattered(plan, zero, trained)
            yield from _gathered(plan, zero, parameters)


def _buckets(plan: Plan, zero: Zero, trained: Sequence[LocalParameter]) -> Iterator[Messages]:
    """ZeRO 1 reduces gradients once a step, ZeRO 2 in each micro-batch (``allreduce_gradients`` in runtime/engine.py).

    Both all-reduce whole buckets (``average_tensor`` in runtime/zero/stage_1_and_2.py).
    """
    reduced = [p.numel for p in trained if p.has_gradient]
    times = 1 if zero.stage == 1 else num_microbatches(plan)
    calls = len(list(closed_before(reduced if zero.stage == 1 else reduced[::-1], zero.bucket_numel)))
    yield Messages("data", "gradients", "all_reduce", times * calls, times * sum(reduced) * num_bytes(zero.communicate))


def _scattered(plan: Plan, zero: Zero, trained: Sequence[LocalParameter]) -> Iterator[Messages]:
    """ZeRO 3 reduces and scatters in each micro-batch (``__avg_scatter_grads`` in runtime/zero/stage3.py)."""
    reduced, num_ranks = [p.numel for p in backward_order(trained) if p.has_gradient], plan.mesh.data
    times = num_microbatches(plan)
    calls = len(list(closed_before(reduced, zero.bucket_numel)))
    scatters = zero.scatters or not zero.is_contiguous
    numel = sum(partition_numel(n, num_ranks) * num_ranks if scatters else n for n in reduced)
    op = "reduce_scatter" if scatters else "all_reduce"
    yield Messages("data", "gradients", op, times * calls, times * numel * num_bytes(zero.communicate))


def _gathered(plan: Plan, zero: Zero, parameters: Sequence[LocalParameter]) -> Iterator[Messages]:
    """ZeRO 3 gathers persistent parameters after the step, other parameters in the passes of each micro-batch."""
    num_ranks = plan.mesh.data
    kept = persistent(zero, parameters)
    rest = {p.spec.path: p for p in parameters if p not in kept}
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        for path in parameter.spec.paths:
            modules.setdefault(module_of(path), []).append(parameter.spec.path)
    numels = {p.spec.path: p.numel for p in parameters}
    passes = [rest[path] for path in _gathered_in_passes(numels, modules.values(), zero.reuse_numel) if path in rest]
    times = num_microbatches(plan)

    def size(some: Sequence[LocalParameter]) -> int:
        return sum(partition_numel(p.numel, num_ranks) * num_ranks * num_bytes(p.dtype) for p in some)

    num_bytes_ = size(kept) + times * size(passes)
    yield Messages("data", "parameters", "all_gather", len(kept) + times * len(passes), num_bytes_)


def _gathered_in_passes(numels: Mapping[str, int], uses: Iterable[Sequence[str]], reuse_numel: int) -> Iterator[str]:
    """Iterate over the parameters that ZeRO 3 gathers in a forward and a backward pass, once for each gather.

    A module's parameters are gathered before it runs, and released after it unless fewer than ``reuse_numel`` elements are
    used before they are used again (``__params_to_release`` in runtime/zero/partitioned_param_coordinator.py once it
    has seen a step). Modules are taken to run in the order in which the model names them, and backwards.

    Args:
        numels: Elements of each parameter.
        uses: Parameters of each module that has some, in order.
        reuse_numel: The distance up to which a parameter is kept.

    >>> list(_gathered_in_passes({"a": 4, "b": 4}, [["a"], ["b"]], 9))
    ['a', 'b']
    >>> list(_gathered_in_passes({"a": 4, "b": 4}, [["a"], ["b"]], 8))
    ['a', 'a', 'b']
    """
    forward = list(uses)
    modules = [*forward, *reversed(forward)]
    before = [0, *accumulate(sum(numels[path] for path in paths) for paths in modules)]
    places: dict[str, list[int]] = {}
    for place, paths in enumerate(modules):
        for path in paths:
            places.setdefault(path, []).append(place)
    for path, used in places.items():
        yield path
        for first, again in pairwise(used):
            # adjacent uses too: with a distance of 0 everything is released
            if before[again] - before[first + 1] >= reuse_numel:
                yield path
