"""Findings of an audit, each with a code by which it can be silenced."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from attrs import Attribute, field, frozen

from .fold_layers import as_pattern, fold
from .pattern import compile_pattern

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .param import ParamSpec

Severity = Literal["error", "warning"]

CODES = {
    "SP001": "an element is not held exactly once",
    "SP002": "a tensor has not exactly one source",
    "SP003": "a tie is broken",
    "SP004": "a rank touches a tensor of another stage",
    "SP005": "ranks issue other collectives than their group",
    "SP006": "values depend on the layout",
    "SP007": "a gradient is not summed once, or the module not handed over once",
    "SP010": "split, and never joined",
    "SP012": "a bias that every rank adds",
    "SP013": "a sum that counts too often",
    "SP014": "gradients that nothing averages",
    "SP020": "made whole on one rank",
    "SP021": "a large tensor that is whole along tensor",
    "SP022": "stages that do not balance",
    "SP023": "parts that differ in size",
    "SP024": "a vocabulary that does not divide",
    "SP025": "float32 where the rest is half",
    "SP026": "trained, and no gradient reaches it",
    "SP027": "tensor reaches across nodes",
    "SP028": "experts that are whole",
    "SP029": "a boundary that sends more than hidden states",
    "SP030": "a device's memory does not suffice",
    "SP031": "an optimizer that is not known",
    "SP032": "a silence that silences nothing",
    "SP033": "a target that nobody accounts for",
    "SP034": "another version of the runtime",
}
"""Codes of findings, with their short names."""

LOUD = ("SP001", "SP002", "SP003", "SP004", "SP005", "SP007", "SP032", "SP033")
"""Codes that cannot be silenced: laws that do not hold for the plan, a silence itself, and a target that is not counted."""

_NAMES = re.compile(r"\{\d+\.\.\d+\}|[^.]+")


def _check_code(_: object, attribute: Attribute[str], code: str) -> None:
    if code not in CODES:
        msg = f"{attribute.name} is a finding's, such as 'SP021', not {code!r}"
        raise ValueError(msg)


def _check_silent(_: Silence, __: Attribute[str], code: str) -> None:
    if code in LOUD:
        msg = f"{code} ({CODES[code]}) cannot be silenced"
        raise ValueError(msg)


@frozen
class Finding:
    """A finding of the audit.

    Args:
        code: Its kind, ``SP`` and three digits, as explained in ``docs/findings.md``.
        severity: ``error`` keeps the plan from being executed, ``warning`` does not.
        path: Tensor or module that it is about; ``""`` for the plan as a whole.
        cause: The fact that was found.
        fix: The nearest mend.
    """

    code: str = field(validator=_check_code)
    severity: Severity
    path: str
    cause: str
    fix: str = ""

    def __str__(self) -> str:
        head = f"{self.code} {self.severity}  {self.path or '(plan)'}: {self.cause}"
        return f"{head}\n         {self.fix}" if self.fix else head


@frozen
class Silence:
    """Findings of a kind that the user knows and accepts.

    Args:
        code: Their kind.
        pattern: Which tensors or modules, with all that these hold: the pattern that was given to ``sch.at``; ``""`` for
            the plan as a whole alone.
        reason: Why they are meant.

    Raises:
        ValueError: If there is no such kind, or it cannot be silenced.

    >>> silence = Silence("SP021", "lm_head", "generation reads it whole")
    >>> silence.covers(Finding("SP021", "warning", "lm_head.weight", "it is whole on every rank"))
    True
    """

    code: str = field(validator=[_check_code, _check_silent])
    pattern: str
    reason: str

    def covers(self, finding: Finding, tie: Iterable[str] = ()) -> bool:
        """Tell whether a finding is silenced: the pattern selects its path or the path of a module around it.

        Args:
            finding: The finding.
            tie: The other paths of its tensor.
        """
        matches = compile_pattern(self.pattern).fullmatch
        around = (path for whole in (finding.path, *tie) for path in _prefixes(whole))
        return finding.code == self.code and any(map(matches, around))


@frozen
class Silenced:
    """A finding that is known and meant, and why."""

    finding: Finding
    reason: str


def silenced(
    findings: Iterable[Finding], silences: Iterable[Silence], tree: Mapping[str, ParamSpec] | None = None
) -> tuple[list[Finding], list[Silenced]]:
    """Return the findings that are not silenced, and the silenced findings, each with the first reason.

    Args:
        findings: The findings.
        silences: The user's silences.
        tree: The tensors, for the aliases of tied tensors.
    """
    loud: list[Finding] = []
    quiet: list[Silenced] = []
    silences = tuple(silences)
    for finding in findings:
        spec = (tree or {}).get(finding.path)
        tie = spec.tie if spec else ()
        reason = next((silence.reason for silence in silences if silence.covers(finding, tie)), None)
        if reason is None:
            loud.append(finding)
        else:
            quiet.append(Silenced(finding, reason))
    return loud, quiet


def folded(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings as they are printed: findings that differ only in the number of a repeated layer are folded.

    >>> [one] = folded(Finding("SP021", "warning", f"layers.{i}.up.weight", f"split layers.{i}.up") for i in range(32))
    >>> print(one)
    SP021 warning  layers.{0..31}.up.weight: split layers.{0..31}.up
    """
    rows = ((f.path, (f.code, f.severity, _without_path(f.cause, f.path), _without_path(f.fix, f.path))) for f in findings)
    return [
        Finding(code, "error" if severity == "error" else "warning", path, _with_path(cause, path), _with_path(fix, path))
        for path, (code, severity, cause, fix) in fold(rows)
    ]


def _without_path(text: str, path: str) -> str:
    """Put marks in the place of a path in a text, and of the modules around it: how many of its names they have."""
    prefixes = sorted(filter(None, _prefixes(path)), key=len, reverse=True)
    for prefix in prefixes:
        depth = prefix.count(".") + 1
        text = text.replace(f"'{prefix}'", f"'\0{depth}\0'")
        if "." in prefix and prefix in text:  # a pattern takes longer to compile than to look for
            text = re.sub(rf"(?<![\w.]){re.escape(prefix)}(?!\w|\.\w)", f"\0{depth}\0", text)
    return text


def _with_path(text: str, path: str) -> str:
    """Put a folded path in the place of marks; within quotes as a pattern."""
    names = _NAMES.findall(path)

    def name(mark: re.Match[str]) -> str:
        said = ".".join(names[: int(mark[2])])
        return f"'{as_pattern(said)}'" if mark[1] else said

    return re.sub("('?)\0(\\d+)\0\\1", name, text)


def _prefixes(path: str) -> Iterator[str]:
    """Iterate over a path and the modules around it; the model itself is around nothing but the plan as a whole."""
    names = path.split(".")
    return (".".join(names[:depth]) for depth in range(len(names), 0, -1))
