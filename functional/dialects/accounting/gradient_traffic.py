"""What a rank sends in a training step besides activations: gradients, and parameters that are gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ....specs.dtypes import num_bytes
from ....specs.steps import SumGradient, SumTied
from ..deepspeed.traffic import deepspeed_reductions
from ..deepspeed.zero_config import Zero
from ..torch.accounting import averaged
from .local_parameters import LocalParameter, local_parameters, total_bytes
from .microbatches import num_microbatches
from .records import Reduction

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
"""Bytes of DDP's buckets, the first one smaller: ``kDefaultFirstBucketBytes`` and ``bucket_cap_mb`` of torch 2.13."""


def reductions(plan: Plan, coordinate: Coordinate) -> Iterator[Reduction]:
    """Iterate over what a rank sends in one training step besides activations and what crosses between stages.

    Gradients over ``data``, those of experts over ``expert_data``, those of tensors that stages hold in common over
    ``pipe``; parameters that ZeRO gathers. Left out are messages of a few numbers: norms, overflows, losses, barriers.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> tree = SpecTree([ParamSpec("weight", (16, 4), "float32")])
    >>> plan = Plan(mesh := Mesh(data=2), tree, (), target="deepspeed", config={"zero_optimization": {"stage": 1}})
    >>> [(row.cargo, row.op, row.num_bytes) for row in reductions(plan, mesh.coordinate(0))]
    [('gradients', 'all_reduce', 256), ('parameters', 'all_gather', 256)]
    """
    if plan.target == "deepspeed":
        yield from deepspeed_reductions(plan, coordinate)
    elif parameters := averaged(plan, coordinate):
        yield Reduction("data", "gradients", "all_reduce", _num_buckets(parameters), total_bytes(parameters))
        yield from _broadcast_buffers(plan, coordinate)
    yield from _experts(plan, coordinate)
    yield from _tied(plan, coordinate)


def _num_buckets(parameters: list[LocalParameter]) -> int:
    """A bucket is closed once it is full: ``compute_bucket_assignment_by_size`` in reducer.cpp of torch/csrc."""
    closed, open_bytes = 0, dict.fromkeys((p.dtype for p in parameters), 0)
    limits = dict.fromkeys(open_bytes, _FIRST_BUCKET)
    for parameter in reversed(parameters):
        open_bytes[parameter.dtype] += parameter.num_bytes
        if open_bytes[parameter.dtype] >= limits[parameter.dtype]:
            closed, open_bytes[parameter.dtype], limits[parameter.dtype] = closed + 1, 0, _BUCKET
    return closed + sum(size > 0 for size in open_bytes.values())


def _broadcast_buffers(plan: Plan, coordinate: Coordinate) -> Iterator[Reduction]:
    """DDP sends buffers from the first rank along ``data`` before a forward pass (``_sync_buffers``); not in a pipeline.

    There only the last backward pass is to average gradients, and DDP sends buffers before a forward pass that follows one.
    """
    held = [s for s in plan.tree.values() if s.kind != "parameter" and coordinate.pipe in s.places(plan.mesh)]
    if held and not plan.pipeline:
        total = sum(spec.local_bytes(coordinate) for spec in held)
        yield Reduction("data", "parameters", "broadcast", 1, total)


def _experts(plan: Plan, coordinate: Coordinate) -> Iterator[Reduction]:
    """The plan sums gradients of experts over ``expert_data`` in each backward pass."""
    followed = plan.microbatch.calls if plan.microbatch else ()
    if plan.mesh.expert_data == 1 or any(call.mesh_axis == "expert_data" for call in followed):
        return
    sizes = [
        plan.tree[f"{step.module}.{step.name}".lstrip(".")].local_bytes(coordinate)
        for step in plan.steps
        if isinstance(step, SumGradient)
        and step.mesh_axis == "expert_data"
        and coordinate.pipe in plan.tree[f"{step.module}.{step.name}".lstrip(".")].places(plan.mesh)
    ]
    if sizes:
        times = num_microbatches(plan)
        yield Reduction("expert_data", "gradients", "all_reduce", times * len(sizes), times * sum(sizes))


def _tied(plan: Plan, coordinate: Coordinate) -> Iterator[Reduction]:
    """Gradients of tensors that several stages hold are summed once a step."""
    if plan.target is None:
        return
    zero = Zero.of(plan) if plan.target == "deepspeed" else None
    paths = {step.path for step in plan.steps if isinstance(step, SumTied) and coordinate.pipe in step.between}
    held = [p for p in local_parameters(plan, coordinate, zero.half if zero else None) if p.spec.path in paths]
    if held:
        wide = num_bytes(zero.accumulate) if zero and zero.wrapper == "bf16" else None
        total = sum(p.numel * (wide or num_bytes(p.dtype)) for p in held)
        yield Reduction("pipe", "gradients", "all_reduce", len(held), total)
