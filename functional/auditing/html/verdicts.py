"""The proofs, the findings, the silenced findings, and the modules that are trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....specs.equality import in_words
from ....specs.finding import CODES, folded
from ....specs.fold_layers import fold
from ....specs.proof import LAWS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ....specs.finding import Finding
    from ....specs.proof import Proof
    from ....specs.report import Report

_MOST_CAUSES = 8


def verdicts(report: Report) -> dict[str, Any]:
    """Return the proofs and the findings, folded over repeated layers."""
    reasons: dict[str, list[Finding]] = {}
    for quiet in report.silenced:
        reasons.setdefault(quiet.reason, []).append(quiet.finding)
    return {
        "findings": _findings(report.findings),
        "silenced": [{**kind, "reason": why} for why, findings in reasons.items() for kind in _findings(findings)],
        "proofs": [_proof(proof) for proof in report.proofs],
        "trusted": [[path, said] for path, (said,) in fold((t.module, (str(t),)) for t in report.trusts)],
    }


def _findings(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return findings by kind, errors first."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in folded(findings):
        kinds.setdefault((finding.severity, finding.code), []).append(finding)
    return [
        {
            "code": code,
            "severity": severity,
            "title": CODES[code],
            "cases": [[case.path, case.cause, case.fix] for case in cases],
        }
        for (severity, code), cases in sorted(kinds.items(), key=lambda kind: kind[0][0] != "error")
    ]


def _proof(proof: Proof) -> dict[str, Any]:
    causes: dict[str, list[str]] = {}
    for path, (cause,) in fold((failure.path, (failure.cause,)) for failure in proof.failures):
        causes.setdefault(path, []).append(cause)
    return {
        "law": proof.law,
        "says": LAWS[proof.law],
        "answer": proof.answer,
        "result": _result(proof),
        "open": in_words(proof.unfollowed),
        "failures": [[path, few, len(all_) - len(few)] for path, all_ in causes.items() for few in [all_[:_MOST_CAUSES]]],
    }


def _result(proof: Proof) -> str:
    match proof.answer:
        case "holds":
            return "; ".join(filter(None, [f"holds in {_cases(proof.num_cases)}", proof.remark]))
        case "fails":
            return f"fails in {_cases(len(proof.failures))}"
        case "not followed":
            return "not followed"


def _cases(num: int) -> str:
    return f"{num:,} case{'' if num == 1 else 's'}"
