"""Find the meshes of a number of ranks that fit the devices, and the cheapest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, evolve
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..specs.dtypes import human_bytes
from ..specs.errors import PlanError
from ..specs.mesh import Mesh
from ..specs.pipeline import Pipeline, Stage
from ..specs.plan import Plan, misfits
from ..specs.search import Candidate, Search
from .audit import audit
from .auditing.memory import memory_at
from .auditing.nearest_meshes import divisors
from .auditing.step_cost import BETWEEN, FLOPS, INSIDE, busiest, charged, step_seconds
from .dialects import dialect_of, find_dialect
from .layout.local_model import LocalModel, following
from .model.known_values import KnownValues
from .pipeline.plan_stages import is_cut
from .plan import plan_build

if TYPE_CHECKING:
    from torch import Tensor

    from ..specs.errors import Problem
    from ..specs.report import Report
    from .schedule import Schedule

Config = Mapping[str, Any] | Callable[[Mesh], Mapping[str, Any] | None] | None


@define
class _Trials:
    """The arguments of a search, and what its trials of meshes have shown so far.

    Args:
        factory: The schedule for a mesh.
        device_memory: Bytes of one device.
        ranks_per_node: Ranks that share a node.
        target: The runtime.
        config: Its configuration, for a mesh.
        example_inputs: One micro-batch.
        seed: The seed of all random numbers.
        init_weights: Whether tensors are initialised, or the user's init code.
        flops: Operations of a forward pass of the whole model; None before the first plan.
        refusals: The problems of each refused mesh.
    """

    factory: Callable[[Mesh], Schedule]
    device_memory: int
    ranks_per_node: int | None
    target: str | None
    config: Callable[[Mesh], Mapping[str, Any] | None]
    example_inputs: Mapping[str, Tensor] | None
    seed: int
    init_weights: bool | Callable[..., object]
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
    """Plan and audit every mesh of a number of ranks, and return those that fit, the cheapest first.

    Meshes are all factorizations into pipe x data x tensor, and ``expert`` within data if the schedule splits over it. A
    mesh is not planned if arithmetic alone shows that it is too large, by the mean bytes of its stages.

    The cost is seconds per micro-batch, the whole mesh at work. With m micro-batches a step on each of d replicas, p places
    along ``pipe`` and t along ``tensor``, a step takes

        (3 F m / (p t FLOPS) + inside / INSIDE + between / BETWEEN) / (1 - (p - 1) / (m + p - 1))

    and the cost is this over m d. F is the number of operations of a forward pass as torch counts them; a backward pass has
    twice as many (Kaplan et al. 2020, section 2.1). The bytes are sent by a rank of the busiest stage in a step; a ring
    with any hop between nodes is charged at that speed (``charged``). The last factor is the bubble of a pipeline (Huang et
    al. 2019, GPipe, section 2.3). Nothing overlaps, and all stages are taken to be equally heavy. The cost ranks meshes; it
    does not predict a time. Equal costs are ordered by peak memory.

    Args:
        sch_factory: A function that returns the schedule for a mesh, cut into as many stages as the mesh has along ``pipe``.
        num_ranks: Ranks of each mesh.
        device_memory: Bytes of one device.
        ranks_per_node: Ranks that share a node; by default all ranks do.
        target: As for ``plan_build``.
        config: The target's configuration, or a function that returns it for a mesh: DeepSpeed's ``train_batch_size``
            depends on ``data``. It sets the number of micro-batches, so that a step with more replicas sees more samples.
        example_inputs: One micro-batch of one replica. Without it neither activations nor computation are counted.
        seed: As for ``plan_build``.
        init_weights: As for ``plan_build``.

    Raises:
        ValueError: If a number is not a positive integer.
        PlanError: If no mesh is to blame: the target is unknown, or all meshes are refused for the same problem.
        TypeError: If ``sch_factory`` is not a function, or does not return a schedule for its mesh.

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
    trials = _Trials(sch_factory, device_memory, ranks_per_node, target, configure, example_inputs, seed, init_weights)
    found = [candidate for mesh in meshes(num_ranks) for candidate in _candidates(trials, mesh)]
    if problems := _common_problems(trials, len(found)):
        raise PlanError(problems)
    found.sort(key=_by_cost)
    return Search(num_ranks, device_memory, tuple(found), tuple(_assumptions(trials)))


def meshes(num_ranks: int) -> Iterator[Mesh]:
    """Iterate over the meshes of a number of ranks, with ``expert=1``.

    >>> [str(mesh) for mesh in meshes(2)]
    ['mesh pipe=1 data=2 tensor=1', 'mesh pipe=1 data=1 tensor=2', 'mesh pipe=2 data=1 tensor=1']
    """
    for pipe in divisors(num_ranks):
        for tensor in divisors(num_ranks // pipe):
            yield Mesh(pipe=pipe, data=num_ranks // pipe // tensor, tensor=tensor)


def _candidates(trials: _Trials, mesh: Mesh) -> Iterator[Candidate]:
    """Try a mesh, and if experts are split also each division of ``data`` by ``expert``."""
    try:
        sch = _schedule(trials, mesh)
    except ValueError as error:
        yield _refused(trials, mesh, error)
        return
    yield _candidate(trials, sch)
    if any(spec.on("expert") for spec in sch.tree.values()):
        for expert in divisors(mesh.data)[1:]:
            other = evolve(mesh, expert=expert)
            try:
                yield _candidate(trials, _schedule(trials, other))
            except ValueError as error:
                yield _refused(trials, other, error)


def _schedule(trials: _Trials, mesh: Mesh) -> Schedule:
    sch = trials.factory(mesh)
    mesh_of = getattr(sch, "mesh", None)
    if mesh_of != mesh:
        found = f"one for {mesh_of}" if isinstance(mesh_of, Mesh) else f"a {type(sch).__name__}"
        msg = f"sch_factory returns the schedule for the mesh that it is given: for {mesh} it returned {found}"
        raise TypeError(msg)
    return sch


def _refused(trials: _Trials, mesh: Mesh, error: ValueError) -> Candidate:
    trials.refusals.append(error.problems if isinstance(error, PlanError) else ())
    return Candidate(mesh, fits=False, cause=_first_cause(error))


def _common_problems(trials: _Trials, num_meshes: int) -> list[Problem]:
    """Return the problems that all meshes have in common, if all are refused."""
    if len(trials.refusals) < num_meshes:
        return []
    first, *others = trials.refusals
    return [problem for problem in first if all(problem in problems for problems in others)]


def _candidate(trials: _Trials, sch: Schedule) -> Candidate:
    """Plan and audit one mesh, unless a lower bound of its memory is too large already."""
    mesh = sch.mesh
    try:
        config = _config_for(trials, sch)
        least = _least_bytes(trials, sch, config)
        if least > trials.device_memory:
            cause = f"its stages keep at least {human_bytes(least)} on average; not planned"
            return Candidate(mesh, fits=False, peak_bytes=least, cause=cause)
        plan = plan_build(
            sch,
            target=trials.target,
            config=config,
            example_inputs=trials.example_inputs,
            seed=trials.seed,
            init_weights=trials.init_weights,
        )
    except ValueError as error:
        return _refused(trials, mesh, error)
    report = audit(plan, ranks_per_node=trials.ranks_per_node)
    if not report.ok:
        error = next(finding for finding in report.findings if finding.severity == "error")
        return Candidate(mesh, fits=False, cause=f"{error.code} {error.path}: {error.cause}")
    if trials.flops is None:
        trials.flops = _forward_flops(sch, trials.example_inputs)
    rows = busiest(report)
    m = report.num_microbatches
    peak = report.worst.memory.peak_bytes
    fits = peak <= trials.device_memory
    return Candidate(
        mesh,
        fits=fits,
        peak_bytes=peak,
        inside_bytes=sum(row.inside_bytes for row in rows),
        between_bytes=sum(row.between_bytes for row in rows),
        cost=step_seconds(mesh, m, trials.flops, *charged(rows)) / (m * mesh.data),
        cause="" if fits else _largest_parts(report),
    )


def _config_for(trials: _Trials, sch: Schedule) -> Mapping[str, Any] | None:
    """Return the configuration for a mesh, without the options for a pipeline where the model is not cut."""
    config, options = trials.config(sch.mesh), dialect_of(trials.target).pipeline_options
    if not options or is_cut(sch) or not isinstance(config, Mapping):
        return config
    return {name: value for name, value in config.items() if name not in options}


def _least_bytes(trials: _Trials, sch: Schedule, config: Mapping[str, Any] | None) -> int:
    """Return a lower bound of the fullest rank's bytes: parameters and optimizer states, by the mean of the stages.

    Padding and tensors shared by stages come on top. 0 if planning will report a problem.
    """
    mesh, (dialect, _) = sch.mesh, find_dialect(trials.target)
    if sch.problems or dialect is None or misfits(mesh, sch.tree) or dialect.check(mesh, sch.tree, sch.layout, config):
        return 0
    whole = evolve(mesh, pipe=1)
    pipeline = Pipeline((Stage((), (), (), ""),)) if is_cut(sch) else None
    plan = Plan(whole, sch.tree, (), trials.target, config, pipeline=pipeline)
    held = memory_at(plan, dialect_of(trials.target), whole.coordinate(0))
    return (held.parameter_bytes + held.buffer_bytes + held.optimizer_bytes + held.master_bytes) // mesh.pipe


def _forward_flops(sch: Schedule, example_inputs: Mapping[str, Tensor] | None) -> int:
    """Return the operations of a forward pass of the whole model as torch counts them; 0 without ``example_inputs``."""
    if example_inputs is None:
        return 0
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    whole = LocalModel(sch.runtime.model, Mesh(), sch.tree, example_inputs=example_inputs)
    local = whole.fake_copy(mode)
    counter = FlopCounterMode(display=False)
    with following(mode, values := KnownValues()), torch.no_grad(), counter:
        local(**whole.fake_inputs(values))
    return counter.get_total_flops()


def _largest_parts(report: Report) -> str:
    """Describe the three largest parts of the fullest rank's memory."""
    worst = report.worst
    names = ("parameter", "buffer", "gradient", "optimizer", "master", "bucket", "boundary", "activation")
    sizes = sorted(((getattr(worst.memory, f"{name}_bytes") or 0, name) for name in names), reverse=True)
    told = ", ".join(f"{name} {human_bytes(size)}" for size, name in sizes[:3] if size)
    return f"rank {worst.coordinate.rank}: {told}"


def _by_cost(candidate: Candidate) -> tuple[int, float, int]:
    peak = candidate.peak_bytes
    if candidate.fits:
        return 0, candidate.cost or 0.0, peak or 0
    return (2, 0.0, 0) if peak is None else (1, float(peak), 0)


def _first_cause(error: ValueError) -> str:
    """Return the first cause of an error, repeated layers folded, and the number of further causes."""
    if not isinstance(error, PlanError):
        return str(error).partition("\n")[0]
    _, first, *rest = [line for line in str(error).splitlines() if not line.startswith("   ")]
    return first.strip() + (f" (and {len(rest)} more)" if rest else "")


def _assumptions(trials: _Trials) -> Iterator[str]:
    flops, inside, between = f"{FLOPS / 1e12:.0f} TFLOP/s", f"{INSIDE / 1e9:.0f} GB/s", f"{BETWEEN / 1e9:.0f} GB/s"
    yield "Cost: seconds for each micro-batch, the whole mesh at work: computation and messages of the busiest stage, over"
    yield f"the part of a step that a pipeline is busy. A device is taken to compute at {flops} and to send at {inside}"
    yield f"inside its node and {between} between nodes (H100), one after the other. It ranks meshes, and foretells no time."
    yield "A ring that leaves its node anywhere is charged as a whole at the speed between nodes."
    if options := dialect_of(trials.target).pipeline_options:
        yield f"Of a config for {trials.target}, {' and '.join(options)} are for the meshes with stages."
    yield "Example inputs are one micro-batch of one replica: with more replicas a step sees more."
    if trials.example_inputs is None:
        yield "There are no example inputs: neither activations nor computation are counted."
    if trials.ranks_per_node is None:
        yield "Nobody said how many ranks share a node: all are taken to."
