"""What planning says to a mutant, and the judge: each mutant is planned with and without inputs, audited, and measured."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Literal

from attrs import frozen

from shardplan.functional import audit, plan_build, verify
from shardplan.specs.errors import PlanError
from shardplan.specs.paths import module_of

Verdict = Literal["right", "wrong", "unknown"]


@frozen
class Outcome:
    """What was found of a mutant.

    Args:
        number: Its place in the draw.
        kind: The kind of its change.
        subject: The right schedule that it was made of.
        description: The change in words.
        verdict: Whether it computes what the whole model computes; unknown if that could not be measured.
        reason: The difference where it begins, or why nothing was measured.
        is_loud: Whether a rank raises an error, all wait for ever, or nothing can be laid out.
        before: Whether planning without inputs refuses it; None where stages need the inputs.
        refused_by: ``planning`` with inputs, ``audit``, ``crash`` for an error that is no refusal, or ``unfollowed`` where
            the law of equality is not followed; empty if it holds.
        paths: Paths of the problems, error findings, and of what was not followed, and those that mends are for.
        is_named: Whether one of them is near the change, as ``is_near`` says.
    """

    number: int
    kind: str
    subject: str
    description: str
    verdict: Verdict
    reason: str
    is_loud: bool = False
    before: bool | None = None
    refused_by: str = ""
    paths: tuple[str, ...] = ()
    is_named: bool = False

    @property
    def cell(self):
        """The column of the table that counts it."""
        if self.verdict == "unknown":
            return "not judged"
        if not self.refused_by:
            return f"{self.verdict}, accepted"
        if self.refused_by == "unfollowed":
            return f"{self.verdict}, not followed"
        if self.verdict == "right":
            return "right, refused"
        return "wrong, refused, named" if self.is_named else "wrong, refused otherwise"


def judge(mutant):
    """Plan, audit and measure a mutant."""
    sch, inputs = mutant.mutation.schedule, mutant.subject.inputs()
    before = None if mutant.subject.mesh.pipe > 1 else bool(refusal(sch)[0])
    verdict, reason, is_loud, problems = measure(sch, inputs)
    refused_by, paths = ("planning", problems) if problems else refusal(sch, inputs)
    is_named = any(is_near(path, place, sch.tree) for path in paths for place in mutant.mutation.places)
    return _outcome(
        mutant, verdict, reason, is_loud=is_loud, before=before, refused_by=refused_by, paths=paths, is_named=is_named
    )


def unjudged(mutant, cause):
    """Return the outcome of a mutant that took too long, or ended its process."""
    return _outcome(mutant, "unknown", cause)


def _outcome(mutant, verdict, reason, **found):
    told = mutant.mutation.description
    return Outcome(mutant.number, mutant.kind, str(mutant.subject), told, verdict, reason, **found)


def refusal(sch, inputs=None):
    """Return who refuses a schedule, empty if nobody does, and the paths that are named."""
    try:
        plan = plan_build(sch, example_inputs=inputs)
        report = audit(plan)
    except PlanError as error:
        return "planning", _paths(error.problems)
    except Exception as error:
        return "crash", (f"{type(error).__name__}: {error}",)
    errors = tuple(finding.path for finding in report.findings if finding.severity == "error")
    if errors or inputs is None:
        return ("audit", errors) if errors else ("", ())
    lost = tuple(found.path for found in plan.equality.unfollowed)
    return ("unfollowed", lost) if lost else ("", ())


def measure(sch, inputs):
    """Return the verdict of ``verify``, where the difference begins, whether it is loud, and what planning refuses.

    A declaration that no plan can be laid out from is wrong: there are no parts with which ranks could compute anything.
    """
    try:
        comparison = verify(sch, inputs)
    except PlanError as error:
        return "wrong", f"layout {error.problems[0].path}: {error.problems[0].cause}", True, _paths(error.problems)
    except Exception as error:
        return "unknown", f"{type(error).__name__}: {error}".splitlines()[0], False, ()
    refused = _paths(comparison.refused)
    if comparison.ok:
        return "right", "", False, refused
    first = comparison.first
    is_loud = any(difference.kind in {"error", "hang"} for difference in comparison.differences)
    return "wrong", f"{first.kind} {first.path}: {first.cause}", is_loud, refused


def is_near(path, place, tree):
    """Tell whether a problem, its mend, or a finding names a change: by its place, or by a module around both that is small.

    The smallest module around the two holds at most half of the model's tensors (a layer, a block; not the model, nor a list
    of layers), and it is the named path itself, or the parent of the changed module, or lies inside that. For a change of
    ``layers.0.attn.qkv`` that is all of ``layers.0.attn``, and ``layers.0``; not ``layers.0.feed``, and no other layer.

    Args:
        path: Path of the problem or finding; or the pattern of a mend, with stars for numbers.
        place: Path of a changed module or tensor.
        tree: The model's tensors.
    """
    parent = module_of(module_of(place) if place in tree else place)
    path = _with_numbers_of(place, path)
    for alias in tree[path].paths if path in tree else (path,):
        around = _around(alias, place)
        if alias == place or (_is_small(around, tree) and (around == alias or _is_within(around, parent))):
            return True
    return False


def _paths(problems):
    """Return the paths of problems, and of what their mends change."""
    mended = (path for problem in problems for path in re.findall(r"\bat(?:\[| )'([^']+)'", problem.fix or ""))
    return tuple(dict.fromkeys([*(problem.path for problem in problems), *mended]))


def _with_numbers_of(place, pattern):
    """Return a pattern with what a place has where it has stars."""
    names = dict(enumerate(place.split(".")))
    return ".".join(names.get(at, name) if name == "*" else name for at, name in enumerate(pattern.split(".")))


def _around(first, second):
    """Return the path of the smallest module around two paths, or their path if they are the same."""
    names = zip(first.split("."), second.split("."), strict=False)
    return ".".join(name for name, _ in takewhile(lambda pair: pair[0] == pair[1], names))


def _is_small(module, tree):
    return 2 * sum(_is_within(path, module) for path in tree) <= len(tree)


def _is_within(path, module):
    return not module or f"{path}.".startswith(f"{module}.")
