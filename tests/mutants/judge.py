"""What planning says to a mutant, and the judge: each mutant is planned with and without inputs, audited, and measured."""

from __future__ import annotations

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
        before: Whether planning without inputs refuses it; None where stages need the inputs.
        refused_by: ``planning`` with inputs, ``audit``, or ``crash`` for an error that is no refusal; empty if accepted.
        paths: Paths of the problems and error findings.
        is_named: Whether one of them is near the change, as ``is_near`` says.
    """

    number: int
    kind: str
    subject: str
    description: str
    verdict: Verdict
    reason: str
    before: bool | None
    refused_by: str
    paths: tuple[str, ...]
    is_named: bool

    @property
    def cell(self):
        """The column of the table that counts it."""
        if self.verdict == "unknown":
            return "not judged"
        if not self.refused_by:
            return f"{self.verdict}, accepted"
        if self.verdict == "right":
            return "right, refused"
        return "wrong, refused, named" if self.is_named else "wrong, refused otherwise"


def judge(mutant):
    """Plan, audit and measure a mutant."""
    sch, inputs = mutant.mutation.schedule, mutant.subject.inputs()
    before = None if mutant.subject.mesh.pipe > 1 else bool(refusal(sch)[0])
    verdict, reason, problems = measure(sch, inputs)
    refused_by, paths = ("planning", problems) if problems else refusal(sch, inputs)
    is_named = any(is_near(path, place, sch.tree) for path in paths for place in mutant.mutation.places)
    told = mutant.mutation.description
    return Outcome(
        mutant.number, mutant.kind, str(mutant.subject), told, verdict, reason, before, refused_by, paths, is_named
    )


def unjudged(mutant, cause):
    """Return the outcome of a mutant that took too long, or ended its process."""
    return Outcome(
        mutant.number, mutant.kind, str(mutant.subject), mutant.mutation.description, "unknown", cause, None, "", (), False
    )


def refusal(sch, inputs=None):
    """Return who refuses a schedule, empty if nobody does, and the paths that are named."""
    try:
        report = audit(plan_build(sch, example_inputs=inputs))
    except PlanError as error:
        return "planning", _paths(error.problems)
    except Exception as error:
        return "crash", (f"{type(error).__name__}: {error}",)
    errors = tuple(finding.path for finding in report.findings if finding.severity == "error")
    return ("audit", errors) if errors else ("", ())


def measure(sch, inputs):
    """Return the verdict of ``verify``, the difference where it begins, and the paths that planning with inputs refuses.

    A declaration that no plan can be laid out from is wrong: there are no parts with which ranks could compute anything.
    """
    try:
        comparison = verify(sch, inputs)
    except PlanError as error:
        return "wrong", f"layout {error.problems[0].path}: {error.problems[0].cause}", _paths(error.problems)
    except Exception as error:
        return "unknown", f"{type(error).__name__}: {error}".splitlines()[0], ()
    refused = _paths(comparison.refused)
    if comparison.ok:
        return "right", "", refused
    first = comparison.first
    return "wrong", f"{first.kind} {first.path}: {first.cause}", refused


def is_near(path, place, tree):
    """Tell whether a problem or finding names a change: by its place, or by a module around both that is small.

    The smallest module around the two holds at most half of the model's tensors (a layer, a block; not the model, nor a list
    of layers), and it is the named path itself, or the parent of the changed module, or lies inside that. For a change of
    ``layers.0.attn.qkv`` that is all of ``layers.0.attn``, and ``layers.0``; not ``layers.0.feed``, and no other layer.

    Args:
        path: Path of the problem or finding.
        place: Path of a changed module or tensor.
        tree: The model's tensors.
    """
    if path == place:
        return True
    around = _around(path, place)
    num = sum(f"{spec.path}.".startswith(f"{around}." if around else "") for spec in tree.values())
    if 2 * num > len(tree):
        return False
    module = module_of(place) if place in tree else place
    return around == path or f"{around}.".startswith(f"{module_of(module)}.")


def _paths(problems):
    return tuple(problem.path for problem in problems)


def _around(*paths):
    """Return the path of the smallest module around some paths, or the path that all begin with."""
    names = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(first for first, *_ in takewhile(lambda found: len(set(found)) == 1, names))
