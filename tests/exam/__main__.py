"""Judge all entries of the exam, and print the table, or write it: ``python -m tests.exam --write docs/exam.md``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .judge import all_entries, judge


def main():
    """Judge the entries; exit with 1 if ``verify`` is wrong on one."""
    parser = argparse.ArgumentParser(prog="python -m tests.exam", description=__doc__)
    parser.add_argument("--write", type=Path, help="file that the table is written to, such as docs/exam.md")
    parser.add_argument("--only", default="", help="part of the names of the entries that are judged")
    arguments = parser.parse_args()
    judgements = []
    entries = [entry for entry in all_entries() if arguments.only in entry.name]
    for number, entry in enumerate(entries, 1):
        sys.stderr.write(f"{number}/{len(entries)} {entry.name}\n")
        judgements.append(judge(entry))
    if arguments.write:
        arguments.write.write_text(page(judgements))
    else:
        sys.stdout.write(page(judgements))
    return 0 if all(judgement.is_judged_right for judgement in judgements) else 1


def page(judgements):
    """Return the page: figures, and a table of the wrong and one of the right entries."""
    wrong = [judgement for judgement in judgements if not judgement.entry.is_right]
    right = [judgement for judgement in judgements if judgement.entry.is_right]
    return "\n".join([_INTRODUCTION.format(**_figures(wrong, right)), *_table(wrong), "\n## Right\n", *_table(right), ""])


_INTRODUCTION = """# The exam

Written by `python -m tests.exam --write docs/exam.md`.

{num_wrong} layouts compute something else than the whole model, and {num_right} near misses compute the same.
Each is a schedule of a small model in [tests/exam](../tests/exam).

- Of the wrong ones `plan_build` with `example_inputs` refuses {refused_wrong}, and says of {unfollowed_wrong} that nobody
  could follow them; without inputs it accepts {accepted}. `verify` finds {found}, and names the place of the fault for
  {named}.
- Of the right ones `plan_build` with `example_inputs` proves {proven_right}, says of {unfollowed_right} that nobody could
  follow them, and refuses {refused_right}; without inputs it refuses {refused}. `verify` finds a difference in {flagged}.

A model that is cut into stages is not planned without `example_inputs`. *With example_inputs*: where planning refuses, or
whether the law of equality `holds` or is `not followed`. Some right ones are code that nobody can follow, with the
user's word for it (`.trust`, `gives`). *Audit*, of the plan without inputs: `ok` or `not ok`, with the codes of
[its findings](findings.md). *Verify*: the kind of the first difference, where it is, and the norm of the difference over the
norm of the whole model's tensor.

## Wrong
"""


def _figures(wrong, right):
    return {
        "num_wrong": len(wrong),
        "num_right": len(right),
        "accepted": sum(j.planned == "accepted" for j in wrong),
        "refused_wrong": _all_or(sum(j.planned_with_inputs.startswith("refused") for j in wrong), len(wrong)),
        "unfollowed_wrong": _or_none(sum(j.planned_with_inputs == "not followed" for j in wrong)),
        "proven_right": _all_or(sum(j.planned_with_inputs == "holds" for j in right), len(right)),
        "unfollowed_right": _or_none(sum(j.planned_with_inputs == "not followed" for j in right)),
        "refused_right": _or_none(sum(j.planned_with_inputs.startswith("refused") for j in right)),
        "found": _all_or(sum(j.is_found for j in wrong), len(wrong)),
        "named": sum(j.is_named for j in wrong),
        "refused": _or_none(sum(j.planned.startswith("refused") for j in right)),
        "flagged": _or_none(sum(j.is_found for j in right)),
    }


def _or_none(number):
    return number or "none"


def _all_or(number, of):
    return "all" if number == of else number


def _table(judgements):
    yield "| entry | report | plan_build | with example_inputs | audit | verify |"
    yield "|---|---|---|---|---|---|"
    for j in judgements:
        cells = j.entry.name, j.entry.report, j.planned, j.planned_with_inputs, j.audited, j.verified
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
