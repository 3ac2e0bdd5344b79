"""All findings of a plan, in the order of their codes, and the silences that silence nothing: SP032.

A theme has a file; its ``FINDINGS`` lists its functions by the first code that each finds.
"""

from __future__ import annotations

from heapq import merge
from typing import TYPE_CHECKING

from ....specs.finding import CODES, Finding
from . import joins, laws, machine, stages, training, uneven_splits, whole_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ....specs.finding import Silence, Silenced
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ...dialects import Dialect

_THEMES = (laws, joins, whole_tensors, stages, uneven_splits, training, machine)


def find_all(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
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
    >>> [finding.code for finding in find_all(plan, audit(plan), dialect_of(None))]
    ['SP014']
    """
    functions = sorted((item for theme in _THEMES for item in theme.FINDINGS.items()), key=lambda item: item[0])
    common = (finding for _, function in functions for finding in function(plan, report, dialect))
    return merge(common, sorted(dialect.findings(plan), key=_code), key=_code)


def _code(finding: Finding) -> str:
    return finding.code


def unused_silences(plan: Plan, report: Report, quiet: Iterable[Silenced]) -> Iterator[Finding]:
    """Iterate over silences that cover no silenced finding, though this audit could have found it.

    Args:
        plan: The plan.
        report: Its report: without a device's memory, say, no audit can find that it does not suffice.
        quiet: The silenced findings.
    """
    findings = [silenced.finding for silenced in quiet]
    for silence in plan.silences:
        ties = ((finding, _tie(plan, finding)) for finding in findings)
        if not _can_be_found(silence, plan, report) or any(silence.covers(finding, tie) for finding, tie in ties):
            continue
        cause = f"nothing is found that {silence.code} ({CODES[silence.code]}) is silenced for: {silence.reason}"
        fix = f"Drop .at[{silence.pattern!r}].silence({silence.code!r}, ...), or mend its pattern"
        yield Finding("SP032", "warning", silence.pattern, cause, fix)


def _can_be_found(silence: Silence, plan: Plan, report: Report) -> bool:
    match silence.code:
        case "SP010":
            return not plan.is_followed
        case "SP026":
            return plan.microbatch is not None
        case "SP027":
            return report.ranks_per_node is not None
        case "SP030":
            return report.device_memory is not None
        case "SP034":
            return False  # found on some machines, by their packages
        case _:
            return True


def _tie(plan: Plan, finding: Finding) -> tuple[str, ...]:
    spec = plan.tree.get(finding.path)
    return spec.tie if spec else ()
