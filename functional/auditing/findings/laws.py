"""Laws that do not hold for the plan: SP001 to SP007."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....specs.finding import Finding
from ....specs.proof import LAWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.finding import Severity
    from ....specs.plan import Plan
    from ....specs.proof import Law
    from ....specs.report import Report
    from ...dialects import Dialect

_AGAIN = "Build the plan anew with plan_build: what was built by hand, or saved and changed, may break it"
_KINDS: dict[Law, tuple[str, Severity, str]] = {
    "cover": ("SP001", "error", _AGAIN),
    "source": ("SP002", "error", _AGAIN),
    "ties": ("SP003", "error", _AGAIN),
    "once": ("SP007", "error", _AGAIN),
    "stages": ("SP004", "error", _AGAIN),
    "order": ("SP005", "error", _AGAIN),
    "values": ("SP006", "warning", "init_weights=True, or load a checkpoint before training"),
}


def unproven(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find the failures of each law: one finding a path, with the first cause."""
    for proof in report.proofs:
        causes: dict[str, list[str]] = {}
        for failure in proof.failures:
            causes.setdefault(failure.path, []).append(failure.cause)
        for path, (first, *others) in causes.items():
            code, severity, fix = _KINDS[proof.law]
            more = f", and {len(others)} cases more" if len(others) > 1 else ", and one case more" if others else ""
            yield Finding(code, severity, path, f"{first}{more}; against the law that {LAWS[proof.law]}", fix)


FINDINGS = {"SP001": unproven}
