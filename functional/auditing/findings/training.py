"""What a runtime keeps for training without need, or without being counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from ...dialects.accounting import optimizer_of, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan
    from ....specs.report import Report

STATE_BYTES = 64 * 2**20
"""Bytes of states that AdamW would keep on a rank, from which a total without them misleads."""


def without_gradient(plan: Plan) -> Iterator[Finding]:
    """Find trained tensors that no gradient reaches with the example inputs."""
    unreached = plan.microbatch.without_gradient if plan.microbatch else ()
    follows = _what_follows(plan) if unreached else ""
    for path in unreached:
        cause = f"{plan.tree[path].type} is trained, and no gradient reaches it with the example inputs: {follows}"
        fix = f"model.get_parameter({path!r}).requires_grad_(False) before the schedule, or let the model use it"
        yield Finding("SP026", "warning", path, cause, fix)


def unknown_optimizer(plan: Plan, report: Report) -> Iterator[Finding]:
    """Find that a target's configuration names no optimizer that is known, so that its states are not counted."""
    if plan.target is None or optimizer_of(plan):
        return
    here = report.worst.coordinate
    named = evolve(plan, config={**(plan.config or {}), "optimizer": {"type": "AdamW"}})
    would = state_of(named, here).optimizer_bytes
    if would < STATE_BYTES:
        return
    cause = (
        f"target={plan.target!r}, and no optimizer that is known stands in its config: its states are not counted. AdamW"
        f" would keep {human_bytes(would)} on rank {here.rank}"
    )
    fix = 'Name it, and the runtime makes it: config={..., "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}'
    yield Finding("SP031", "warning", "", cause, fix)


def _what_follows(plan: Plan) -> str:
    """Return what the target does with a trained tensor that has no gradient."""
    here = plan.mesh.at(pipe=0)
    if plan.target == "deepspeed":
        is_partitioned = state_of(plan, here).master_bytes > 0
        keeps = "its states and a float32 copy are kept" if is_partitioned else "its states are kept"
        return f"DeepSpeed reduces zeros for it, {keeps}, and weight decay changes it"
    if plan.target == "torch" and plan.mesh.data > 1 and plan.pipeline is None:
        return "DistributedDataParallel waits for it, and the second step fails"
    return "the optimizer is given it all the same, and passes over it"
