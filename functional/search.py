"""Which meshes of a number of ranks fit the devices, and which costs least. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, evolve, frozen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..specs.dtypes import human_bytes
from ..specs.errors import PlanError
from ..specs.mesh import Mesh
from ..specs.pipeline import Pipeline, Stage
from ..specs.plan import Plan, misfits
from ..specs.search import Candidate, Search
from ..specs.traffic import StepTraffic
from .audit import audit
from .auditing.memory import memory_at
from .auditing.nearest_meshes import divisors
from .dialects import dialect_of, find_dialect
from .layout.local_model import LocalModel, following
from .pipeline.plan_stages import is_cut
from .plan import plan_build

if TYPE_CHECKING:
    from torch import Tensor

    from ..specs.errors import Problem
    from ..specs.report import Report
    from .schedule import Schedule

FLOPS = 400e12
"""Operations a second of one device: what Llama 3 405B was trained with on H100s in bfloat16 (Dubey et al. 2024, The Llama 3
Herd of Models, table 4: 380 to 430)."""

INSIDE = 450e9
"""Bytes a second from a device to others of its node: NVLink of an H100, 900 GB/s both ways (NVIDIA H100 datasheet)."""

BETWEEN = 50e9
"""Bytes a second from a device to other nodes: one 400 Gbit/s link for each (NVIDIA DGX H100 datasheet)."""

Config = Mapping[str, Any] | Callable[[Mesh], Mapping[str, Any] | None] | None


@frozen
class _Subject:
    """What is planned on each mesh.

    Args:
        factory: The schedule for a mesh.
        device_memory: Bytes of one device.
        ranks_per_node: Ranks that share a node.
        target: The runtime.
        config: Its configuration, for a mesh.
        example_inputs: One micro-batch.
        seed: What all random numbers derive from.
        init_weights: Whether, and by whose code, tensors are initialised.
    """

    factory: Callable[[Mesh], Schedule]
    device_memory: int
    ranks_per_node: int | None
    target: str | None
    config: Callable[[Mesh], Mapping[str, Any] | None]
    example_inputs: Mapping[str, Tensor] | None
    seed: int
    init_weights: bool | Callable[..., object]


@define
class _Seen:
    """What was seen on the meshes so far.

    Args:
        flops: Operations of a forward pass of the whole model.
        refusals: The problems of each mesh that was refused.
    """

    flops: int | None = None
    refusals: list[tuple[Problem, ...]] = Factory(list)


def search(
    sch_factory: Callable[[Mesh], Schedule],
    *,
    num_ranks: int,
    device_memory: int,
    ranks_per_node: int | None = None,
    target: str | None = None,
    config: Config = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    init_weights: bool | Callable[..., object] = True,
) -> Search:
    """Plan and audit every mesh of a number of ranks, and return which fit, the cheapest first.

    Meshes are all of pipe x data x tensor, and of ``expert`` within data where the schedule splits over it. A mesh is not
    planned where arithmetic alone shows that it is too large: what the stages keep together, by the mean of them.

    The cost is counted in seconds for each micro-batch, the whole mesh at work. With m micro-batches a step on each of d
    replicas, p places along ``pipe`` and t along ``tensor``, a step takes

        (3 F m / (p t FLOPS) + inside / INSIDE + between / BETWEEN) / (1 - (p - 1) / (m + p - 1))

    and the cost is this over m d. F are the operations of a forward pass as torch counts them, a backward pass has twice as
    many (Kaplan et al. 2020, section 2.1); bytes are those that a rank of the busiest stage puts on the wire in a step, of
    a ring of which any hop leaves the node all at the speed between nodes (``charged``); the last factor is the bubble of a
    pipeline (Huang et al. 2019, GPipe, section 2.3). Nothing overlaps, and stages weigh
    alike. It ranks meshes; it does not foretell a time. Equal costs are told apart by the peak of memory.

    Args:
        sch_factory: A function that returns the schedule for a mesh, cut into as many stages as the mesh has along ``pipe``.
        num_ranks: Ranks of each mesh.
        device_memory: Bytes of one device.
        ranks_per_node: Ranks that share a node; without it all are taken to share one.
        target: As for ``plan_build``.
        config: The target's configuration, or a function that returns it for a mesh: DeepSpeed's ``train_batch_size``
            depends on ``data``. The number of micro-batches is what it says, so that with more replicas a step sees more.
        example_inputs: One micro-batch of one replica. Without it neither activations nor computation are counted.
        seed: As for ``plan_build``.
        init_weights: As for ``plan_build``.

    Raises:
        ValueError: If a number is none, or below 1.
        PlanError: If no mesh is to blame: the target is unknown, or all meshes are refused for one and the same problem.
        TypeError: If ``sch_factory`` is no function, or returns no schedule for the mesh that it is given.

    >>> import torch
    >>> from torch import nn
    >>> from shardplan.functional import create_schedule
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
    >>> def factory(mesh):
    ...     return create_schedule(model, mesh).at["0"].colwise().at["2"].rowwise()
    >>> found = search(factory, num_ranks=2, device_memory=12 * 2**20)
    >>> str(found.best.mesh), [candidate.fits for candidate in found.candidates]
    ('mesh pipe=1 data=1 tensor=2', [True, False, False])
    """
    for name, number in (("num_ranks", num_ranks), ("device_memory", device_memory)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            msg = f"{name} is a positive integer, not {number!r}: search(factory, num_ranks=64, device_memory=80 * 2**30)"
            raise ValueError(msg)
    if not callable(sch_factory):
        msg = f"sch_factory is a function from a mesh to a schedule, not {sch_factory!r}"
        raise TypeError(msg)
    if unknown := find_dialect(target)[1]:
        raise PlanError(unknown)
    configure = config if callable(config) else lambda _: config
    subject = _Subject(sch_factory, device_memory, ranks_per_node, target, configure, example_inputs, seed, init_weights)
    seen = _Seen()
    found = [candidate for mesh in meshes(num_ranks) for candidate in _with_experts(subject, mesh, seen)]
    if everywhere := _everywhere(seen, len(found)):
        raise PlanError(everywhere)
    found.sort(key=_order)
    return Search(num_ranks, device_memory, tuple(found), tuple(_assumed(subject)))


def meshes(num_ranks: int) -> Iterator[Mesh]:
    """Iterate over the meshes of a number of ranks, ``expert`` left out.

    >>> [str(mesh) for mesh in meshes(2)]
    ['mesh pipe=1 data=2 tensor=1', 'mesh pipe=1 data=1 tensor=2', 'mesh pipe=2 data=1 tensor=1']
    """
    for pipe in divisors(num_ranks):
        for tensor in divisors(num_ranks // pipe):
            yield Mesh(pipe=pipe, data=num_ranks // pipe // tensor, tensor=tensor)


def _with_experts(subject: _Subject, mesh: Mesh, seen: _Seen) -> Iterator[Candidate]:
    """Try a mesh, and where experts are split also those on which they are spread over some of ``data``."""
    try:
        sch = _schedule(subject, mesh)
    except ValueError as error:
        yield _refused(mesh, error, seen)
        return
    yield _tried(subject, sch, seen)
    if any(spec.on("expert") for spec in sch.tree.values()):
        for expert in divisors(mesh.data)[1:]:
            other = evolve(mesh, expert=expert)
            try:
                yield _tried(subject, _schedule(subject, other), seen)
            except ValueError as error:
                yield _refused(other, error, seen)


def _schedule(subject: _Subject, mesh: Mesh) -> Schedule:
    sch = subject.factory(mesh)
    mesh_of = getattr(sch, "mesh", None)
    if mesh_of != mesh:
        found = f"one for {mesh_of}" if isinstance(mesh_of, Mesh) else f"a {type(sch).__name__}"
        msg = f"sch_factory returns the schedule for the mesh that it is given: for {mesh} it returned {found}"
        raise TypeError(msg)
    return sch


def _refused(mesh: Mesh, error: ValueError, seen: _Seen) -> Candidate:
    seen.refusals.append(error.problems if isinstance(error, PlanError) else ())
    return Candidate(mesh, fits=False, cause=_first(error))


def _everywhere(seen: _Seen, num_meshes: int) -> list[Problem]:
    """Return the problems of all meshes, if all are refused: they are not the meshes' fault."""
    if len(seen.refusals) < num_meshes:
        return []
    first, *others = seen.refusals
    return [problem for problem in first if all(problem in problems for problems in others)]


def _tried(subject: _Subject, sch: Schedule, seen: _Seen) -> Candidate:
    """Plan and audit one mesh, unless it is too large in any case."""
    mesh = sch.mesh
    try:
        config = _config(subject, sch)
        least = _least_bytes(subject, sch, config)
        if least > subject.device_memory:
            cause = f"its stages keep at least {human_bytes(least)} on average; not planned"
            return Candidate(mesh, fits=False, peak_bytes=least, cause=cause)
        plan = plan_build(
            sch,
            target=subject.target,
            config=config,
            example_inputs=subject.example_inputs,
            seed=subject.seed,
            init_weights=subject.init_weights,
        )
    except ValueError as error:
        return _refused(mesh, error, seen)
    report = audit(plan, ranks_per_node=subject.ranks_per_node)
    if not report.ok:
        error = next(finding for finding in report.findings if finding.severity == "error")
        return Candidate(mesh, fits=False, cause=f"{error.code} {error.path}: {error.cause}")
    if seen.flops is None:
        seen.flops = _forward_flops(sch, subject.example_inputs)
    rows = _busiest(report)
    m = report.num_microbatches
    peak = report.worst.memory.peak_bytes
    fits = peak <= subject.device_memory
    return Candidate(
        mesh,
        fits=fits,
        peak_bytes=peak,
        inside_bytes=sum(row.inside_bytes for row in rows),
        between_bytes=sum(row.between_bytes for row in rows),
        cost=step_seconds(mesh, m, seen.flops, *charged(rows)) / (m * mesh.data),
        cause="" if fits else _largest(report),
    )


def _config(subject: _Subject, sch: Schedule) -> Mapping[str, Any] | None:
    """Return the configuration for a mesh, without the options for a pipeline where the model is not cut."""
    config, options = subject.config(sch.mesh), dialect_of(subject.target).pipeline_options
    if not options or is_cut(sch) or not isinstance(config, Mapping):
        return config
    return {name: value for name, value in config.items() if name not in options}


def charged(rows: Iterable[StepTraffic]) -> tuple[int, int]:
    """Return the bytes that are sent at the speed of a node's inside, and at that between nodes.

    Each round of a ring sends one part over all its hops at once (Patarasu and Yuan 2009, section 4), and the next round
    waits for the slowest: a ring of which any hop leaves the node runs at that hop's speed. Messages from rank to rank are
    each charged where they go.

    >>> ring = StepTraffic(0, "data", "gradients", "all_reduce", 1, 400, wire_bytes=600, between_bytes=150)
    >>> message = StepTraffic(0, "pipe", "boundary", "send", 2, 600, wire_bytes=600, between_bytes=150)
    >>> charged([ring]), charged([message])
    ((0, 600), (450, 150))
    """
    inside = between = 0
    for row in rows:
        slow = row.wire_bytes if row.between_bytes and row.op != "send" else row.between_bytes
        inside, between = inside + row.wire_bytes - slow, between + slow
    return inside, between


def step_seconds(mesh: Mesh, num_microbatches: int, forward_flops: int, inside_bytes: int, between_bytes: int) -> float:
    """Return the seconds that a training step is taken to last: the formula of ``search``, with bytes as ``charged``.

    >>> step_seconds(Mesh(pipe=2), 1, forward_flops=400_000_000_000_000, inside_bytes=0, between_bytes=0)
    3.0
    """
    m, p = num_microbatches, mesh.pipe
    computing = 3 * forward_flops * m / (p * mesh.tensor * FLOPS)
    sending = inside_bytes / INSIDE + between_bytes / BETWEEN
    return (computing + sending) / (1 - (p - 1) / (m + p - 1))


def _least_bytes(subject: _Subject, sch: Schedule, config: Mapping[str, Any] | None) -> int:
    """Return bytes that the fullest rank keeps in any case: parameters and the optimizer's states, by the mean of stages.

    Padding and what stages hold in common is on top. Nothing, where planning has a problem to tell.
    """
    mesh, (dialect, _) = sch.mesh, find_dialect(subject.target)
    if sch.problems or dialect is None or misfits(mesh, sch.tree) or dialect.check(mesh, sch.tree, sch.layout, config):
        return 0
    whole = evolve(mesh, pipe=1)
    pipeline = Pipeline((Stage((), (), (), ""),)) if is_cut(sch) else None
    plan = Plan(whole, sch.tree, (), subject.target, config, pipeline=pipeline)
    held = memory_at(plan, dialect_of(subject.target), whole.coordinate(0))
    return (held.parameter_bytes + held.buffer_bytes + held.optimizer_bytes + held.master_bytes) // mesh.pipe


def _forward_flops(sch: Schedule, example_inputs: Mapping[str, Tensor] | None) -> int:
    """Return the operations of a forward pass of the whole model as torch counts them; 0 where it is not known with what."""
    if example_inputs is None:
        return 0
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    whole = LocalModel(sch.runtime.model, Mesh(), sch.tree, example_inputs=example_inputs)
    local = whole.fake_copy(mode)
    counter = FlopCounterMode(display=False)
    with following(mode), torch.no_grad(), counter:
        local(**whole.fake_inputs())
    return counter.get_total_flops()


def _busiest(report: Report) -> list[StepTraffic]:
    """Return what a rank sends in a step on the stage where it takes longest."""
    stages: dict[int, list[StepTraffic]] = {0: []}
    for row in report.training:
        stages.setdefault(row.stage, []).append(row)
    return max(stages.values(), key=lambda rows: charged(rows)[0] / INSIDE + charged(rows)[1] / BETWEEN)


def _largest(report: Report) -> str:
    """Say what the fullest rank has most of."""
    worst = report.worst
    names = ("parameter", "buffer", "gradient", "optimizer", "master", "bucket", "boundary", "activation")
    sizes = sorted(((getattr(worst.memory, f"{name}_bytes") or 0, name) for name in names), reverse=True)
    told = ", ".join(f"{name} {human_bytes(size)}" for size, name in sizes[:3] if size)
    return f"rank {worst.coordinate.rank}: {told}"


def _order(candidate: Candidate) -> tuple[int, float, int]:
    peak = candidate.peak_bytes
    if candidate.fits:
        return 0, candidate.cost or 0.0, peak or 0
    return (2, 0.0, 0) if peak is None else (1, float(peak), 0)


def _first(error: ValueError) -> str:
    """Return the first cause of an error, repeated layers folded, and how many there are besides."""
    if not isinstance(error, PlanError):
        return str(error).partition("\n")[0]
    _, first, *rest = [line for line in str(error).splitlines() if not line.startswith("   ")]
    return first.strip() + (f" (and {len(rest)} more)" if rest else "")


def _assumed(subject: _Subject) -> Iterator[str]:
    flops, inside, between = f"{FLOPS / 1e12:.0f} TFLOP/s", f"{INSIDE / 1e9:.0f} GB/s", f"{BETWEEN / 1e9:.0f} GB/s"
    yield "Cost: seconds for each micro-batch, the whole mesh at work: computation and messages of the busiest stage, over"
    yield f"the part of a step that a pipeline is busy. A device is taken to compute at {flops} and to send at {inside}"
    yield f"inside its node and {between} between nodes (H100), one after the other. It ranks meshes, and foretells no time."
    yield "A ring that leaves its node anywhere is charged as a whole at the speed between nodes."
    if options := dialect_of(subject.target).pipeline_options:
        yield f"Of a config for {subject.target}, {' and '.join(options)} are for the meshes with stages."
    yield "Example inputs are one micro-batch of one replica: with more replicas a step sees more."
    if subject.example_inputs is None:
        yield "There are no example inputs: neither activations nor computation are counted."
    if subject.ranks_per_node is None:
        yield "Nobody said how many ranks share a node: all are taken to."
