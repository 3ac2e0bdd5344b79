"""The only effect: a plan is carried out."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from attrs import field, frozen
from rich.console import Console
from rich.progress import Progress
from torch import nn

from ..specs.errors import PlanError, Problem
from ..specs.finding import folded
from ..specs.plan import Plan
from ..specs.program import RANDOM_SCHEME
from ..specs.steps import AsDTensors
from .audit import audit
from .dialects import find_dialect
from .interpreter.interpret import Effects, interpret
from .interpreter.standing import stand
from .interpreter.torch_effects import TorchEffects
from .model.callables import find
from .model.compare import differences
from .model.copy import copy_module, on_meta
from .pipeline.build_stages import planned_partition
from .planning.dtensor_steps import as_dtensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..specs.finding import Finding
    from ..specs.receipt import Receipt
    from ..specs.steps import Step
    from .pipeline.partition import Partition

_log = logging.getLogger("shardplan")

Layout = Literal["local", "dtensor"]
"""What the tensors of the module are: each rank's own parts, or DTensors that know of all."""


@frozen
class Built:
    """What executing a plan gives to one rank; unpacks as ``model, optimizer``.

    Args:
        model: What is trained: the module, or the target's engine around it. None with effects of the caller's.
        optimizer: The target's optimizer, or the given one; None if there is none.
        module: This rank's own torch module: the whole model's, or that of its (first) pipeline stage.
        modules: All of this rank's stages, several under an interleaved pipeline; else the one module.
        extras: Whatever else the target returned, by name.
        device_mesh: The device mesh of ``layout="dtensor"``, with dimensions ``data`` and ``tensor``; else None.
        receipt: What was really allocated, sent and taken.
    """

    model: Any
    optimizer: Any
    module: nn.Module | None = field(repr=False)
    modules: tuple[nn.Module, ...] = field(repr=False)
    extras: Any = field(repr=False)
    device_mesh: DeviceMesh | None = field(repr=False)
    receipt: Receipt

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.optimizer))


def execute(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    effects: Effects[Any] | None = None,
    progress: bool = True,
    optimizer: Callable[..., Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    layout: Layout = "local",
) -> Built:
    """Carry out a plan on this rank; every rank of the mesh calls it. The given module stays as it is.

    Args:
        plan: What to do.
        model: The module; the one that was scheduled if left out. A plan that was loaded needs it.
        device: Where tensors go: the current CUDA device where there is one, else the CPU.
        effects: Other effects than real ones, e.g. a recorder; then nothing is allocated or sent here.
        progress: Whether rank 0 shows a bar on a terminal.
        optimizer: Function from the trained parameters to an optimizer.
        loss_fn: Loss of a pipeline's last stage.
        layout: ``dtensor`` makes parameters and buffers DTensors of torch, over a device mesh with dimensions ``data`` and
            ``tensor`` (``built.device_mesh``), for torch's distributed checkpoints, ``fully_shard`` over ``data``, and other
            tools that need the global tensor. Modules compute with local tensors all the same, and gradients are DTensors.

    Raises:
        PlanError: In a single process: if the audit refuses the plan, or the model is not the planned one.
        ExecutionError: On every rank, with the first error of any rank: another plan, a wrong world size, init code that
            raises, ...

    >>> import torch
    >>> from torch import nn
    >>> from shardplan.specs import Mesh
    >>> from shardplan.functional import create_schedule, plan_build
    >>> with torch.device("meta"):
    ...     model = nn.Linear(4, 2)
    >>> built = execute(plan_build(create_schedule(model, Mesh()), seed=1))
    >>> built.module.weight.shape, built.receipt.num_tensors
    (torch.Size([2, 4]), 2)
    """
    if not isinstance(plan, Plan):
        msg = f"execute takes a plan, not a {type(plan).__name__}: execute(plan_build(schedule))"
        raise TypeError(msg)
    with _no_collection():
        return _execute(plan, model, device, effects, optimizer, loss_fn, layout=layout, progress=progress)


def _execute(
    plan: Plan,
    model: nn.Module | None,
    device: torch.device | str | None,
    effects: Effects[Any] | None,
    optimizer: Callable[..., Any] | None,
    loss_fn: Callable[..., Any] | None,
    *,
    layout: Layout,
    progress: bool,
) -> Built:
    start = time.monotonic()
    if effects is not None:
        plan = _laid_out(plan, layout)
        interpret(plan, plan.mesh.coordinate(effects.rank), effects)
        return Built(None, None, None, (), {}, None, effects.ledger.receipt(effects.rank, time.monotonic() - start))
    refused: PlanError | None = None
    try:
        plan = _laid_out(plan, layout)
    except PlanError as wrong:
        refused = wrong
    coordinate, error = stand(plan)
    error = error or refused
    parts: Partition | None = None
    given, copied, chosen = plan.runtime.model if model is None else model, nn.Module(), torch.device("cpu")
    try:
        chosen = _device(device)
        findings = _refuse(plan, given, optimizer, loss_fn)
        parts = planned_partition(plan, given) if plan.pipeline else None
        copied = copy_module(given, on_meta, for_planning=False)
        for finding in findings if coordinate.rank == 0 else ():
            _log.warning("%s", finding)
    except Exception as wrong:  # noqa: BLE001  whatever is wrong here, the other ranks wait for the opening agreement
        error = error or wrong
    real = TorchEffects(coordinate, chosen, given, copied, plan.runtime.callables, optimizer, loss_fn, parts)
    with _bar(plan, shown=progress and coordinate.rank == 0) as on_step:
        interpret(plan, coordinate, real, error=error, on_step=on_step)
    assert real.wrapped is not None, "every plan ends with a Wrap step"
    receipt = real.ledger.receipt(coordinate.rank, time.monotonic() - start)
    model, made, extras = real.wrapped.model, real.wrapped.optimizer, real.wrapped.extras
    return Built(model, made, real.modules[0], real.modules, extras, real.device_mesh, receipt)


def _laid_out(plan: Plan, layout: Layout) -> Plan:
    if layout not in get_args(Layout):
        raise PlanError([Problem("layout", f"{layout!r} is unknown", f"There are {', '.join(get_args(Layout))}")])
    return as_dtensors(plan) if layout == "dtensor" else plan


@contextmanager
def _no_collection() -> Iterator[None]:
    """Look for no garbage within the block: thousands of modules are none, and would be looked through again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse(plan: Plan, model: nn.Module | None, optimizer: object, loss_fn: object) -> list[Finding]:
    findings = folded(audit(plan).findings)
    problems = [Problem(f.path, f.cause, f.fix) for f in findings if f.severity == "error"]
    if plan.random_scheme != RANDOM_SCHEME:
        cause = (
            f"the plan is for version {plan.random_scheme} of the random numbers, and this shardplan draws {RANDOM_SCHEME}"
        )
        problems.append(Problem("random_scheme", cause, "Plan again, or execute with the shardplan that planned it"))
    dialect, unknown = find_dialect(plan.target)
    problems += unknown
    if loss_fn is not None and not callable(loss_fn):
        cause = f"it is a function from the model's output and the targets to the loss, not a {type(loss_fn).__name__}"
        problems.append(Problem("loss_fn", cause, "loss_fn=lambda output, target: ..."))
    elif dialect is not None and (plan.pipeline or loss_fn is not None):
        problems += dialect.check_loss(plan, loss_fn)
    problems += _wrong_optimizer(plan, optimizer)
    for name in plan.callables:
        try:
            find(name, plan.runtime.callables)
        except PlanError as error:
            problems += error.problems
    if model is not None and not isinstance(model, nn.Module):
        problems.append(Problem("model", f"it is a torch.nn.Module, not {model!r}", "execute(plan, model)"))
    elif model is None:
        problems.append(Problem("", "a plan that was loaded carries no model", "execute(plan, model)"))
    else:
        problems += [*differences(plan, model), *_in_scripted(plan, model)]
    if problems:
        raise PlanError(problems)
    return findings


def _in_scripted(plan: Plan, model: nn.Module) -> Iterator[Problem]:
    """Iterate over tensors that a plan makes DTensors of, in scripted modules, whose code takes none."""
    if any(isinstance(step, AsDTensors) for step in plan.steps):
        scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
        for spec in plan.tree.values():
            if any(path.startswith(f"{prefix}." if prefix else "") for path in spec.paths for prefix in scripted):
                cause = "it belongs to a scripted module, whose code takes no DTensor"
                yield Problem(spec.path, cause, 'execute(plan, layout="local")', spec.type)


def _wrong_optimizer(plan: Plan, optimizer: object) -> Iterator[Problem]:
    if optimizer is not None and not callable(optimizer):
        cause = f"it is a function from parameters to an optimizer, not a {type(optimizer).__name__}"
        yield Problem("optimizer", cause, "optimizer=lambda parameters: torch.optim.AdamW(parameters)")
    elif optimizer is not None and (plan.config or {}).get("optimizer") is not None:
        cause = "one is given, and config.optimizer names one: another would run than the plan says"
        yield Problem("optimizer", cause, "Leave it out, or plan without config.optimizer")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        chosen = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    else:
        chosen = torch.device(device)
    if chosen.type == "meta":
        raise PlanError([Problem("device", "nothing can be held on meta", "device='cpu', or a CUDA device")])
    _log.info("tensors go to %s", chosen)
    return chosen


@contextmanager
def _bar(plan: Plan, *, shown: bool) -> Iterator[Callable[[Step], None]]:
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("executing the plan", total=len(plan.steps))
        yield lambda _: progress.advance(task)
