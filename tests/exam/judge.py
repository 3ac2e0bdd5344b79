"""What planning, the audit and ``verify`` say of the entries."""

from __future__ import annotations

import importlib
import pkgutil

import torch
from attrs import frozen

import tests.exam
from shardplan.functional import audit, plan_build, verify
from shardplan.specs import PlanError

from .entry import ENTRIES, Entry


@frozen
class Judgement:
    """What is said of an entry.

    Args:
        entry: The entry.
        planned: What ``plan_build`` says without inputs: ``accepted``, or where it refuses; ``-`` for stages.
        planned_with_inputs: Where it refuses with inputs; ``holds`` or ``not followed``, as the law of equality, if not.
        audited: What the audit says of the plan; ``-`` without a plan.
        verified: What ``verify`` says.
        is_found: Whether ``verify`` finds a difference.
        is_named: Whether the difference that it names is where the fault is.
    """

    entry: Entry
    planned: str
    planned_with_inputs: str
    audited: str
    verified: str
    is_found: bool
    is_named: bool

    @property
    def is_judged_right(self) -> bool:
        """Whether ``verify`` finds a difference in a wrong entry, and none in a right one."""
        return self.is_found != self.entry.is_right


def all_entries():
    """Return the entries of all modules of this package, in the order of their names."""
    for module in sorted(found.name for found in pkgutil.iter_modules(tests.exam.__path__)):
        if module != "__main__" and not module.startswith("test_"):
            importlib.import_module(f"tests.exam.{module}")
    return list(ENTRIES.values())


def judge(entry):
    """Return what is said of an entry."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some models are not on the meta device
        sch, inputs = entry.make()
    is_cut = bool(sch.cuts or sch.handed or sch.even)
    plan, planned = (None, "-") if is_cut else _plan(sch)
    comparison = verify(sch, inputs)
    refused = comparison.refused
    proven, _ = (None, "") if refused else _plan(sch, example_inputs=inputs)
    plan = plan or proven
    first = comparison.first
    return Judgement(
        entry=entry,
        planned=planned,
        planned_with_inputs=proven.equality.answer if proven else f"refused at {_place(refused[0].path)}",
        audited="-" if plan is None else _audited(plan),
        verified="right" if first is None else _told(first),
        is_found=not comparison.ok,
        is_named=first is not None and _is_at(first, entry.where),
    )


def _plan(sch, **options):
    """Return the plan, or None, and what is said of it."""
    try:
        return plan_build(sch, **options), "accepted"
    except PlanError as error:
        return None, f"refused at {_place(error.problems[0].path)}"


def _audited(plan):
    report = audit(plan)
    codes = sorted({finding.code for finding in report.findings})
    return " ".join(["ok" if report.ok else "not ok", *codes])


def _told(difference):
    size = "" if difference.relative in {None, float("inf")} else f", {_percent(difference.relative)}"
    return f"{difference.kind} of {_place(difference.path)}{size}"


def _percent(relative):
    """Return a part in percent, with two digits.

    >>> _percent(0.1234), _percent(1.149), _percent(0.000456)
    ('12 %', '110 %', '0.046 %')
    """
    text = f"{100 * relative:.1e}"
    return f"{float(text):g} %"


def _place(path):
    return f"`{path}`" if path else "the model"


def _is_at(difference, where):
    """Tell whether a difference is at a path, within it, or says that it begins there."""
    return difference.path == where or difference.path.startswith(f"{where}.") or f"'{where}'" in difference.cause
