"""Memory and time of training that is spent without need, or is not counted: SP025, SP026, SP031."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve

from ....specs.dtypes import human_bytes, num_bytes, short_name
from ....specs.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan
    from ....specs.report import Report
    from ...dialects import Dialect

HALF_SHARE = 0.5
"""Share of the elements of floating-point parameters from which a 16-bit dtype is the dtype that the model computes in."""

STATE_BYTES = 64 * 2**20
"""Bytes of AdamW's states on a rank from which a total without them misleads."""


def full_precision(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find float32 and float64 parameters of a model that is mostly bfloat16 or float16; buffers may have any dtype.

    Of any size: a small parameter costs few bytes, but its products are float32, and so are all later activations.
    """
    if dialect.training(plan).cast_to is not None:
        return
    floating = [s for s in plan.tree.values() if s.kind == "parameter" and s.dtype.startswith(("float", "bfloat"))]
    elements: dict[str, int] = {}
    for spec in floating:
        elements[spec.dtype] = elements.get(spec.dtype, 0) + spec.num_elements
    half = max(("bfloat16", "float16"), key=lambda dtype: elements.get(dtype, 0))
    if elements.get(half, 0) < HALF_SHARE * max(1, sum(elements.values())):
        return
    for spec in floating:
        if spec.dtype in ("float32", "float64"):
            here = plan.mesh.at(pipe=spec.places(plan.mesh)[0])
            local = spec.local_bytes(here)
            more = human_bytes(local - local * num_bytes(half) // num_bytes(spec.dtype))
            cause = (
                f"{spec.type} stands where most of the model is {short_name(half)}: {more} more on a rank, and activations"
                f" that meet it become {short_name(spec.dtype)}"
            )
            fix = f"model.get_parameter({spec.path!r}) to torch.{half} before the schedule, or .silence('SP025', reason=...)"
            yield Finding("SP025", "warning", spec.path, cause, fix)


def without_gradient(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find trained tensors that no gradient reaches with the example inputs."""
    unreached = plan.microbatch.without_gradient if plan.microbatch else ()
    follows = dialect.training(plan).without_gradient
    for path in unreached:
        cause = f"{plan.tree[path].type} is trained, and no gradient reaches it with the example inputs: {follows}"
        fix = f"model.get_parameter({path!r}).requires_grad_(False) before the schedule, or let the model use it"
        yield Finding("SP026", "warning", path, cause, fix)


def unknown_optimizer(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find a configuration without a known optimizer, whose states are therefore not counted."""
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


FINDINGS = {"SP025": full_precision, "SP026": without_gradient, "SP031": unknown_optimizer}
