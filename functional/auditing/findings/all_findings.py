"""All findings of a plan, in the order of their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .machine import memory_overflow, tensor_across_nodes
from .opaque_init import made_whole
from .precision import full_precision
from .replicas import large_replicas, uneven_parts
from .stages import unbalanced, wide_boundaries
from .sums import counted_twice, not_averaged, whole_biases
from .training import unknown_optimizer, without_gradient
from .unjoined import unjoined
from .unproven import unproven
from .vocabulary import undivided
from .whole_experts import whole_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.finding import Finding
    from ....specs.plan import Plan
    from ....specs.report import Report


def find(plan: Plan, report: Report) -> Iterator[Finding]:
    """Iterate over all findings of a plan, one a path, silenced ones too.

    Args:
        plan: The plan.
        report: What is known of it, all but the findings.

    >>> from shardplan.functional import audit
    >>> from shardplan.specs import Mesh, Plan, SpecTree
    >>> from shardplan.specs.steps import Wrap
    >>> plan = Plan(Mesh(data=8), SpecTree(), [Wrap(None)])
    >>> [finding.code for finding in find(plan, audit(plan))]
    ['SP014']
    """
    yield from unproven(report)
    yield from unjoined(plan)
    yield from whole_biases(plan)
    yield from counted_twice(plan)
    yield from not_averaged(plan)
    yield from made_whole(plan)
    yield from large_replicas(plan)
    yield from unbalanced(plan, report)
    yield from uneven_parts(plan)
    yield from undivided(plan)
    yield from full_precision(plan)
    yield from without_gradient(plan)
    yield from tensor_across_nodes(plan, report)
    yield from whole_experts(plan)
    yield from wide_boundaries(plan)
    yield from memory_overflow(plan, report)
    yield from unknown_optimizer(plan, report)
