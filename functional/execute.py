"""The only effect: carry out a plan on this rank.

``execute`` checks the plan and copies the module, lets the interpreter carry out the steps with real effects, and returns
the filled module as the runtime wraps it.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from attrs import Factory, define
from rich.console import Console
from rich.progress import Progress
from torch import nn

from ..specs.errors import PlanError, Problem
from ..specs.finding import folded
from ..specs.plan import Plan
from ..specs.program import RANDOM_SCHEME
from ..specs.steps import AsDTensors
from .audit import audit
from .built import Built
from .dialects import find_dialect
from .guards.watch import watch
from .interpreter.interpret import interpret
from .interpreter.torch_effects import TorchEffects
from .interpreter.world import own_coordinate
from .model.callables import missing_callables
from .model.copy import copy_module, on_meta
from .model.read import differences
from .pipeline.build_stages import planned_partition
from .planning.dtensor_steps import as_dtensors

if TYPE_CHECKING:
    from ..specs.finding import Finding
    from ..specs.steps import Step
    from .interpreter.effects import Effects
    from .pipeline.partition import Partition

_log = logging.getLogger("shardplan")

TensorLayout = Literal["local", "dtensor"]
"""Whether the module's tensors are this rank's shards, or DTensors that know the global tensor."""


def execute(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    effects: Effects[Any] | None = None,
    progress: bool = True,
    optimizer: Callable[..., Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    layout: TensorLayout = "local",
    check_inputs: int = 10,
) -> Built:
    """Carry out a plan on this rank; every rank of the mesh calls it. The given module stays as it is.

    Args:
        plan: The plan.
        model: The module; by default the scheduled module. A plan that was loaded needs it.
        device: The device of all tensors; by default the current CUDA device, or the CPU if there is none.
        effects: Effects instead of the real ones, e.g. a recorder; then nothing is allocated or sent here.
        progress: Whether rank 0 shows a progress bar on a terminal.
        optimizer: Function from the trained parameters to an optimizer.
        loss_fn: Loss of a pipeline's last stage.
        layout: ``dtensor`` makes parameters and buffers DTensors of torch, over a device mesh with dimensions ``data`` and
            ``tensor`` (``built.device_mesh``), for torch's distributed checkpoints, ``fully_shard`` over ``data``, and other
            tools that need the global tensor. Modules compute with local tensors all the same, and gradients are DTensors.
        check_inputs: Number of calls of the module whose inputs are compared along ``tensor``, by an ``all_reduce`` of 16
            bytes, and of steps of optimizers before which norms of whole parameters and of their gradients are, by two.
            Calls in evaluation and generation count too. A difference raises :class:`TrainingError`; 0 compares nothing.

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
    start = time.monotonic()
    with _garbage_collection_paused():
        if effects is not None:
            plan = _with_layout(plan, layout)
            interpret(plan, plan.mesh.coordinate(effects.rank), effects)
            receipt = effects.ledger.receipt(effects.rank, time.monotonic() - start)
            return Built(plan, None, None, None, (), {}, None, receipt)
        coordinate, error = own_coordinate(plan)
        given: Any = plan.runtime.model if model is None else model
        ready = _prepare(
            plan,
            given,
            device,
            layout=layout,
            optimizer=optimizer,
            loss_fn=loss_fn,
            check_inputs=check_inputs,
            rank=coordinate.rank,
        )
        real = TorchEffects(
            coordinate, ready.device, given, ready.module, plan.runtime.callables, optimizer, loss_fn, ready.partition
        )
        with _progress_bar(plan, shown=progress and coordinate.rank == 0) as on_step:
            interpret(ready.plan, coordinate, real, error=error or ready.error, on_step=on_step)
        if plan.pipeline is None:
            watch(real.modules[0], plan, coordinate, real.groups.get(("tensor",)), ready.device, check_inputs)
        return _built(ready.plan, real, time.monotonic() - start)


@define
class _Ready:
    """The inputs of the steps on this rank; after an error stand-ins, as the rank still has to join collectives.

    Args:
        plan: The plan, with the asked-for layout of tensors.
        device: The device of all tensors.
        module: A copy of the user's module, with its tensors on meta.
        partition: The graphs of the pipeline's stages; None without a pipeline.
        error: The first error; the opening agreement tells all ranks.
    """

    plan: Plan
    device: torch.device = Factory(lambda: torch.device("cpu"))
    module: nn.Module = Factory(nn.Module)
    partition: Partition | None = None
    error: Exception | None = None


def _prepare(
    plan: Plan,
    model: nn.Module,
    device: torch.device | str | None,
    *,
    layout: TensorLayout,
    optimizer: Callable[..., Any] | None,
    loss_fn: Callable[..., Any] | None,
    check_inputs: int,
    rank: int,
) -> _Ready:
    """Choose the device, check everything, cut the stages and copy the module; keep the first error."""
    ready = _Ready(plan)
    try:
        ready.device = _choose_device(device)
        ready.plan = _with_layout(plan, layout)
        findings = _check(ready.plan, model, optimizer, loss_fn)
        if not isinstance(check_inputs, int) or check_inputs < 0:
            cause = f"it is a number of calls, 0 or more, not {check_inputs!r}"
            raise PlanError([Problem("check_inputs", cause, "Leave it out, or check_inputs=0 to compare nothing")])  # noqa: TRY301
        ready.partition = planned_partition(plan, model) if plan.pipeline else None
        ready.module = copy_module(model, on_meta, for_planning=False)
        for finding in findings if rank == 0 else ():
            _log.warning("%s", finding)
    except Exception as error:  # noqa: BLE001  whatever is wrong here, the other ranks wait for the opening agreement
        ready.error = error
    return ready


def _built(plan: Plan, effects: TorchEffects, seconds: float) -> Built:
    wrapped, modules = effects.wrapped, effects.modules
    assert wrapped is not None, "every plan ends with a Wrap step"
    receipt = effects.ledger.receipt(effects.rank, seconds)
    return Built(
        plan,
        wrapped.model,
        wrapped.optimizer,
        modules[0],
        modules,
        wrapped.extras,
        effects.device_mesh,
        receipt,
        wrapped.norm,
        effects.groups.get(("tensor",)),
    )


def _choose_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        chosen = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    else:
        chosen = torch.device(device)
    if chosen.type == "meta":
        raise PlanError([Problem("device", "nothing can be held on meta", "device='cpu', or a CUDA device")])
    _log.info("tensors go to %s", chosen)
    return chosen


def _with_layout(plan: Plan, layout: TensorLayout) -> Plan:
    if layout not in get_args(TensorLayout):
        raise PlanError([Problem("layout", f"{layout!r} is unknown", f"There are {', '.join(get_args(TensorLayout))}")])
    return as_dtensors(plan) if layout == "dtensor" else plan


def _check(plan: Plan, model: object, optimizer: object, loss_fn: object) -> list[Finding]:
    """Return the audit's findings.

    Raises:
        PlanError: With everything that forbids the execution: the audit's errors, wrong arguments, another model.
    """
    findings = folded(audit(plan).findings)
    problems = [
        *(Problem(finding.path, finding.cause, finding.fix) for finding in findings if finding.severity == "error"),
        *_wrong_random_scheme(plan),
        *_wrong_target(plan, loss_fn),
        *_wrong_optimizer(plan, optimizer),
        *missing_callables(plan.callables, plan.runtime.callables),
        *_wrong_model(plan, model),
    ]
    if problems := problems or _not_installed(plan):
        raise PlanError(problems)
    return findings


def _wrong_random_scheme(plan: Plan) -> Iterator[Problem]:
    if plan.random_scheme != RANDOM_SCHEME:
        planned = f"the plan is for version {plan.random_scheme} of the random numbers"
        cause = f"{planned}, and this shardplan draws {RANDOM_SCHEME}"
        yield Problem("random_scheme", cause, "Plan again, or execute with the shardplan that planned it")


def _wrong_target(plan: Plan, loss_fn: object) -> Iterator[Problem]:
    dialect, _ = find_dialect(plan.target)  # the audit has an error for an unknown target
    if loss_fn is not None and not callable(loss_fn):
        cause = f"it is a function from the model's output and the targets to the loss, not a {type(loss_fn).__name__}"
        yield Problem("loss_fn", cause, "loss_fn=lambda output, target: ...")
    elif dialect is not None and (plan.pipeline or loss_fn is not None):
        yield from dialect.check_loss(plan, loss_fn)


def _not_installed(plan: Plan) -> list[Problem]:
    """Return why the target's runtime cannot be used here; asked last, as importing a runtime takes seconds."""
    dialect, _ = find_dialect(plan.target)
    return dialect.check_installed() if dialect is not None else []


def _wrong_optimizer(plan: Plan, optimizer: object) -> Iterator[Problem]:
    if optimizer is not None and not callable(optimizer):
        cause = f"it is a function from parameters to an optimizer, not a {type(optimizer).__name__}"
        yield Problem("optimizer", cause, "optimizer=lambda parameters: torch.optim.AdamW(parameters)")
    elif optimizer is not None and (plan.config or {}).get("optimizer") is not None:
        cause = "one is given, and config.optimizer names one: another would run than the plan says"
        yield Problem("optimizer", cause, "Leave it out, or plan without config.optimizer")


def _wrong_model(plan: Plan, model: object) -> Iterator[Problem]:
    if model is None:
        yield Problem("", "a plan that was loaded carries no model", "execute(plan, model)")
    elif not isinstance(model, nn.Module):
        yield Problem("model", f"it is a torch.nn.Module, not {model!r}", "execute(plan, model)")
    else:
        yield from differences(plan, model)
        if any(isinstance(step, AsDTensors) for step in plan.steps):
            yield from _scripted_dtensors(plan, model)


def _scripted_dtensors(plan: Plan, model: nn.Module) -> Iterator[Problem]:
    """Iterate over planned DTensors that belong to scripted modules, whose code takes none."""
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    for spec in plan.tree.values():
        if any(path.startswith(f"{prefix}." if prefix else "") for path in spec.paths for prefix in scripted):
            cause = "it belongs to a scripted module, whose code takes no DTensor"
            yield Problem(spec.path, cause, 'execute(plan, layout="local")', spec.type)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause Python's garbage collection, which would traverse thousands of live modules again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _progress_bar(plan: Plan, *, shown: bool) -> Iterator[Callable[[Step], None]]:
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("executing the plan", total=len(plan.steps))
        yield lambda _: progress.advance(task)
