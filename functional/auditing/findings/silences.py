"""Silences that silence nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....specs.finding import CODES, Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ....specs.finding import Silence, Silenced
    from ....specs.plan import Plan
    from ....specs.report import Report


def unused(plan: Plan, report: Report, quiet: Iterable[Silenced]) -> Iterator[Finding]:
    """Iterate over silences that cover none of the findings that were silenced, where such could have been found.

    Args:
        plan: The plan.
        report: What is known of it: without a device's memory, say, nobody can find that it does not suffice.
        quiet: What was silenced.
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
