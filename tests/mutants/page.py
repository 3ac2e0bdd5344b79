"""The page of mutants: what became of each kind of change."""

from __future__ import annotations

from collections import Counter

from tests.mutants.draw import KINDS
from tests.mutants.subjects import SUBJECTS

COLUMNS = (
    "wrong, accepted",
    "wrong, refused, named",
    "wrong, refused otherwise",
    "wrong, not followed",
    "right, accepted",
    "right, refused",
    "right, not followed",
    "not judged",
)

_HEAD = """# Mutants: right layouts, changed at random

Written by `python -m tests.mutants --num {num} --seed {seed} --write docs/mutants.md`.

{subjects} right schedules (by `schedule_from_tp_plan`, by `infer_schedule` and by hand; over tensor, data × tensor,
expert × tensor, pipe × tensor, with split sequences, ties, padding, repeated heads and dropout) are changed in
{kinds} ways, each time in one place or in all layers alike. Each of the {mutants} mutants is planned with
`plan_build(sch, example_inputs=...)`, audited, and measured by `verify`, also where it is refused.

- **wrong**: `verify` finds a difference from the whole model, in outputs, gradients, weights after a step, dropout masks or
  collectives; or no parts can be laid out at all, as where a split does not divide.
- **accepted**: planning with inputs says nothing, the audit has no error, and its law of equality holds.
- **not followed**: the same, but the audit says that nobody could follow some part of the model.
- **named**: a problem, its mend, or a finding is about the changed module or tensor, about a module around it with at most
  half of the model's tensors, or about something with the same parent.
- **right, accepted**: the change does not matter: a granule where parts are cut elsewhere anyway, a size that no code reads,
  an axis counted from the other end, features that columns and rows order alike, a sum that was declared twice.
- **right, refused**: all ranks compute what the whole model computes, and planning or the audit refuses all the same.
"""


def page(outcomes, num, seed):
    """Return the page as Markdown; the same outcomes give the same text."""
    names = {"num": num, "seed": seed, "subjects": len(SUBJECTS), "kinds": len(KINDS), "mutants": len(outcomes)}
    wrong = [outcome for outcome in outcomes if outcome.verdict == "wrong"]
    accepted = [outcome for outcome in wrong if not outcome.refused_by]
    parts = [
        _HEAD.format(**names).rstrip(),
        _summary(wrong, accepted),
        "## By kind of change",
        by_kind(outcomes),
        "## By schedule",
        by_subject(outcomes),
        "## Who refuses",
        _refusers(outcomes),
        "## Where the difference begins",
        "The kind of difference that `verify` names first; `layout` where nothing can be laid out.",
        _beginnings(accepted, wrong),
        "## Wrong and accepted",
        "The first mutant of each kind: what was changed, and where the difference begins.",
        _examples(accepted),
    ]
    if unjudged := [outcome for outcome in outcomes if outcome.verdict == "unknown"]:
        parts += ["## Not judged", "\n".join(_line(outcome) for outcome in unjudged)]
    return "\n\n".join(parts) + "\n"


def _summary(wrong, accepted):
    silent = sum(not outcome.is_loud for outcome in accepted)
    share = f": {100 * len(accepted) / len(wrong):.0f} %" if wrong else ""
    told = f"Of {len(wrong)} wrong mutants {len(accepted)} are accepted{share}."
    return f"{told} {silent} of these are silent: no rank stops, and the numbers are others."


def by_kind(outcomes):
    return _table(((kind, [o for o in outcomes if o.kind == kind]) for kind in KINDS), "change")


def by_subject(outcomes):
    return _table(((str(s), [o for o in outcomes if o.subject == str(s)]) for s in SUBJECTS), "schedule")


def _table(rows, first):
    """Return a table of counts: rows are pairs of a name and its outcomes; the last row has all together."""
    lines = [f"| {first} | mutants | {' | '.join(COLUMNS)} |", "|---|" + "--:|" * (len(COLUMNS) + 1)]
    rows = [(name, list(outcomes)) for name, outcomes in rows]
    total = [outcome for _, outcomes in rows for outcome in outcomes]
    for name, found in [*rows, ("**all**", total)]:
        counts = Counter(outcome.cell for outcome in found)
        lines.append(f"| {name} | {len(found)} | {' | '.join(str(counts[column] or '') for column in COLUMNS)} |")
    return "\n".join(lines)


def _refusers(outcomes):
    """Return a table of who refuses wrong and right mutants; stages cannot be planned without inputs."""
    lines = ["| | wrong | right |", "|---|--:|--:|"]
    told = (
        ("planning without inputs", lambda o: bool(o.before)),
        ("planning with inputs", lambda o: o.refused_by == "planning"),
        ("the audit, of what is planned with inputs", lambda o: o.refused_by == "audit"),
        ("an error that is no refusal", lambda o: o.refused_by == "crash"),
        ("nobody, but the audit says that it was not followed", lambda o: o.refused_by == "unfollowed"),
        ("nobody", lambda o: not o.refused_by),
        ("**all**", lambda _: True),
    )
    for name, holds in told:
        counts = Counter(outcome.verdict for outcome in outcomes if holds(outcome))
        lines.append(f"| {name} | {counts['wrong']} | {counts['right']} |")
    return "\n".join(lines)


def _beginnings(accepted, wrong):
    lines = ["| difference | wrong, accepted | wrong |", "|---|--:|--:|"]
    few, many = (Counter(map(_beginning, group)) for group in (accepted, wrong))
    lines += [f"| {name} | {few[name] or ''} | {many[name]} |" for name in sorted(many, key=lambda name: (-few[name], name))]
    return "\n".join(lines)


def _beginning(outcome):
    """Return the kind of the first difference."""
    return outcome.reason.partition(" ")[0]


def _examples(accepted):
    first = {}
    for outcome in accepted:
        first.setdefault(outcome.kind, outcome)
    return "\n".join(_line(first[kind]) for kind in KINDS if kind in first)


def _line(outcome):
    where = outcome.reason.partition(" ")[2].partition(": ")[0]
    found = f"{_beginning(outcome)} of {f'`{where}`' if where else 'the model'}"
    told = found if outcome.verdict == "wrong" else outcome.reason
    return f"- **{outcome.kind}** ({outcome.subject}): `{outcome.description}`: {told}"
