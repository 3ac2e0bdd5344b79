"""Memory of training that is kept without need, or is not counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan
    from ....specs.report import Report
    from ...dialects import Dialect

STATE_BYTES = 64 * 2**20
"""Bytes of states that AdamW would keep on a rank, from which a total without them misleads."""


def without_gradient(plan: Plan, dialect: Dialect) -> Iterator[Finding]:
    """Find trained tensors that no gradient reaches with the example inputs."""
    unreached = plan.microbatch.without_gradient if plan.microbatch else ()
    follows = dialect.training(plan).without_gradient
    for path in unreached:
        cause = f"{plan.tree[path].type} is trained, and no gradient reaches it with the example inputs: {follows}"
        fix = f"model.get_parameter({path!r}).requires_grad_(False) before the schedule, or let the model use it"
        yield Finding("SP026", "warning", path, cause, fix)


def unknown_optimizer(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find that a target's configuration names no optimizer that is known, so that its states are not counted."""
    if plan.target is None or dialect.training(plan).optimizer:
        return
    here = report.worst.coordinate
    named = evolve(plan, config={**(plan.config or {}), "optimizer": {"type": "AdamW"}})
    would = dialect.state(named, here).optimizer_bytes
    if would < STATE_BYTES:
        return
    cause = (
        f"target={plan.target!r}, and no optimizer that is known stands in its config: its states are not counted. AdamW"
        f" would keep {human_bytes(would)} on rank {here.rank}"
    )
    fix = 'Name it, and the runtime makes it: config={..., "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}'
    yield Finding("SP031", "warning", "", cause, fix)
