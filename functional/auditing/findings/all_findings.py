"""All findings of a plan, in the order of their codes."""

from __future__ import annotations

from heapq import merge
from typing import TYPE_CHECKING

from .machine import memory_overflow, tensor_across_nodes
from .opaque_init import made_whole
from .precision import full_precision
from .replicas import large_replicas, uneven_parts
from .stages import unbalanced, wide_boundaries
from .sums import counted_twice, whole_biases
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
    from ...dialects import Dialect


def find(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Iterate over all findings of a plan in the order of their codes, one a path, silenced findings too.

    Args:
        plan: The plan.
        report: Its report, without findings.
        dialect: The dialect of its target, which has findings of its own.

    >>> from shardplan.functional import audit
    >>> from shardplan.functional.dialects import dialect_of
    >>> from shardplan.specs import Mesh, Plan, SpecTree
    >>> from shardplan.specs.steps import Wrap
    >>> plan = Plan(Mesh(data=8), SpecTree(), [Wrap(None)])
    >>> [finding.code for finding in find(plan, audit(plan), dialect_of(None))]
    ['SP014']
    """
    theirs = sorted(dialect.findings(plan), key=_code)
    return merge(_of_every_runtime(plan, report, dialect), theirs, key=_code)


def _code(finding: Finding) -> str:
    return finding.code


def _of_every_runtime(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    yield from unproven(report)
    yield from unjoined(plan)
    yield from whole_biases(plan)
    yield from counted_twice(plan)
    yield from made_whole(plan)
    yield from large_replicas(plan)
    yield from unbalanced(plan, report)
    yield from uneven_parts(plan)
    yield from undivided(plan)
    yield from full_precision(plan, dialect)
    yield from without_gradient(plan, dialect)
    yield from tensor_across_nodes(plan, report)
    yield from whole_experts(plan)
    yield from wide_boundaries(plan)
    yield from memory_overflow(plan, report)
    yield from unknown_optimizer(plan, report, dialect)
