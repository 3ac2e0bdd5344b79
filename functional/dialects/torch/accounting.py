"""Memory and messages of training with torch alone, by the code of torch 2.13."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import evolve

from ..accounting.local_parameters import LocalParameter, local_parameters, total_bytes
from ..accounting.messages import Messages, crossings, tied_sums, with_gradient
from ..accounting.state import State, whole_state
from ..accounting.training import UNKNOWN, named_optimizer
from ..handover import split_experts

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.plan import Plan

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
"""Bytes of DDP's buckets, the first one smaller: ``kDefaultFirstBucketBytes`` and ``bucket_cap_mb``."""


def num_microbatches(plan: Plan) -> int:
    """Return the micro-batches of a training step."""
    return (plan.config or {}).get("num_microbatches", 1)


def torch_state(plan: Plan, coordinate: Coordinate) -> State:
    """Return the bytes that a rank keeps: whole parameters, gradients and states, DDP's buckets, tensors at boundaries."""
    state = whole_state(plan, coordinate, named_optimizer(plan.config) or UNKNOWN)
    buckets, boundary = total_bytes(_averaged(plan, coordinate)), _boundary_bytes(plan, coordinate)
    return evolve(state, bucket_bytes=buckets, boundary_bytes=boundary)


def torch_messages(plan: Plan, coordinate: Coordinate) -> Iterator[Messages]:
    """Iterate over the messages of a step: tensors that cross, gradients that DDP averages, gradients of tied tensors."""
    yield from crossings(plan, coordinate.pipe, num_microbatches(plan))
    if parameters := _averaged(plan, coordinate):
        yield Messages("data", "gradients", "all_reduce", _num_buckets(parameters), total_bytes(parameters))
        yield from _broadcast_buffers(plan, coordinate)
    yield from tied_sums(plan, coordinate)


def in_flight(plan: Plan, stage: int) -> int:
    """Return the largest number of micro-batches whose activations a stage keeps at one time; 1 without a pipeline.

    >>> from shardplan.specs import Mesh, Pipeline, Plan, SpecTree, Stage
    >>> pipeline = Pipeline(tuple(Stage((), (), (), "") for _ in range(4)))
    >>> config = {"num_microbatches": 8}
    >>> plan = Plan(Mesh(pipe=4), SpecTree(), (), target="torch", config=config, pipeline=pipeline)
    >>> [in_flight(plan, stage) for stage in range(4)]
    [4, 3, 2, 1]
    """
    return max(kept[stage] for kept in _moments(plan, stage % plan.mesh.pipe)) if plan.pipeline else 1


def _averaged(plan: Plan, coordinate: Coordinate) -> list[LocalParameter]:
    """Return the parameters whose gradients DDP averages over ``data``: it keeps a second copy of each gradient.

    The reducer's buckets are allocated once, for all parameters (``initialize_buckets`` in
    torch/csrc/distributed/c10d/reducer.cpp); gradients are copied into them, as DDP is made without
    ``gradient_as_bucket_view``. Gradients of split experts are summed by the plan.
    """
    if plan.mesh.data == 1:
        return []
    split = set(split_experts(plan))
    return [p for p in local_parameters(plan, coordinate) if p.has_gradient and p.spec.path not in split]


def _num_buckets(parameters: list[LocalParameter]) -> int:
    """Count DDP's buckets: a bucket is closed once it is full (``compute_bucket_assignment_by_size`` in reducer.cpp)."""
    closed, open_bytes = 0, dict.fromkeys((p.dtype for p in parameters), 0)
    limits = dict.fromkeys(open_bytes, _FIRST_BUCKET)
    for parameter in reversed(parameters):
        open_bytes[parameter.dtype] += parameter.num_bytes
        if open_bytes[parameter.dtype] >= limits[parameter.dtype]:
            closed, open_bytes[parameter.dtype], limits[parameter.dtype] = closed + 1, 0, _BUCKET
    return closed + sum(size > 0 for size in open_bytes.values())


def _broadcast_buffers(plan: Plan, coordinate: Coordinate) -> Iterator[Messages]:
    """Iterate over the broadcast of buffers before DDP's forward pass (``_sync_buffers``); there is none in a pipeline.

    In a pipeline only the last backward pass averages gradients, and DDP sends buffers before a forward pass that follows
    such a backward pass.
    """
    held = [s for s in plan.tree.values() if s.kind != "parameter" and coordinate.pipe in s.places(plan.mesh)]
    if held and not plan.pipeline:
        total = sum(spec.local_bytes(coordinate) for spec in held)
        yield Messages("data", "parameters", "broadcast", 1, total)


def _boundary_bytes(plan: Plan, coordinate: Coordinate) -> int:
    """Return the bytes of buffers that receive every micro-batch and every gradient, and of outputs kept for backward.

    ``args_recv_info``, ``grad_recv_info`` and ``fwd_cache`` in torch/distributed/pipelining/stage.py.
    """
    if not plan.pipeline:
        return 0
    num, stages, received = num_microbatches(plan), plan.stages, 0
    for number in range(coordinate.pipe, len(stages), plan.mesh.pipe):
        received += num * stages[number - 1].output_bytes if number else 0
        if number < len(stages) - 1:
            received += num * sum(tensor.num_bytes for tensor in with_gradient(stages[number].outputs))
    outputs = (
        sum(num_kept * stages[number].output_bytes for number, num_kept in kept.items())
        for kept in _moments(plan, coordinate.pipe)
    )
    return received + max(outputs)


def _moments(plan: Plan, place: int) -> Iterator[Counter[int]]:
    """Iterate over the moments of a schedule at which a place along ``pipe`` keeps most: micro-batches kept by stage.

    Under 1F1B a stage keeps as many as there are stages from it to the last, if there are so many micro-batches
    (``Schedule1F1B`` in torch/distributed/pipelining/schedules.py); GPipe runs all forward passes first.
    """
    num, num_stages, pipe = num_microbatches(plan), len(plan.stages), plan.mesh.pipe
    match (plan.config or {}).get("schedule"):
        case "gpipe":
            yield Counter({place: num})
        case "interleaved_1f1b":
            yield from _interleaved(num_stages // pipe, pipe, num, place)
        case _:
            yield Counter({place: min(num, num_stages - place)})


def _interleaved(num_local: int, pipe: int, num: int, place: int) -> Iterator[Counter[int]]:
    """A place runs a round of micro-batches forward through a stage, then through its next stage; backward likewise.

    After the warm-up each forward pass is followed by a backward pass (``ScheduleInterleaved1F1B`` in
    torch/distributed/pipelining/schedules.py, after Narayanan et al. 2021, section 2.2).
    """
    a_round = num // max(1, num // pipe)
    warm_up = min((num_local - 1) * a_round + 2 * (pipe - 1 - place), num * num_local)
    kept: Counter[int] = Counter()
    for step in range(num * num_local):
        kept[step // a_round % num_local * pipe + place] += 1
        yield kept.copy()
        if step >= warm_up:
            back = (step - warm_up) // a_round % num_local
            kept[(num_local - 1 - back) * pipe + place] -= 1
