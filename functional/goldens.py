"""Goldens: the listing of a plan in a file, compared by a test."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

from attrs import Factory, define

from ..specs.listing import listing
from ..specs.plan import Plan
from .saving.atomic import write_whole

UPDATE = "pytest --update-goldens"


@define
class Updates:
    """Whether goldens are written rather than compared; only the pytest plugin sets it.

    Args:
        are_on: Whether goldens are written.
        written: The files written so far.
    """

    are_on: bool = False
    written: list[Path] = Factory(list)


UPDATES = Updates()
"""The updates of this process."""


def assert_plan_matches(plan: Plan, file: str | Path) -> None:
    """Compare a plan with its golden: the mesh, a line for each family of tensors, and the changes of how modules compute.

    Seed and fingerprint are left out, so that a golden changes only if one of its lines does. With ``pytest
    --update-goldens`` the file is written instead.

    Args:
        plan: The plan.
        file: The golden; a relative path counts from the folder of the file that calls this.

    Raises:
        TypeError: If ``plan`` is not a plan.
        AssertionError: If they differ, with a unified diff, or the golden is missing; with the command that writes it.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> plan = Plan(Mesh(tensor=2), SpecTree([ParamSpec("weight", (4,), "float32")]), steps=())
    >>> assert_plan_matches(plan, "golden/weight.txt")
    Traceback (most recent call last):
    AssertionError: the golden golden/weight.txt is missing; pytest --update-goldens writes it:
    mesh pipe=1 data=1 tensor=2
    stage 0  weight  f32[4]  not planned  16 B/rank
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    if not isinstance(plan, Plan):
        msg = f"a golden is of a plan, not of a {type(plan).__name__}: assert_plan_matches(plan_build(schedule), file)"
        raise TypeError(msg)
    # relative to the test file, wherever pytest was started
    path = Path(sys._getframe(1).f_code.co_filename).resolve().parent / file  # noqa: SLF001
    head = f"{plan.mesh}  target={plan.target}" if plan.target else str(plan.mesh)
    text = "\n".join([head, *listing(plan.mesh, plan.tree, plan.steps, plan.pipeline, plan.silences, plan.trusts), ""])
    kept = path.read_text(encoding="utf-8") if path.exists() else None
    if kept == text:
        return
    if UPDATES.are_on:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
        UPDATES.written.append(path)
        return
    shown = _shown(path)
    if kept is None:
        msg = f"the golden {shown} is missing; {UPDATE} writes it:\n{text.rstrip()}"
        raise AssertionError(msg)
    changes = difflib.unified_diff(kept.splitlines(), text.splitlines(), str(shown), "the plan", lineterm="", n=1)
    msg = "\n".join([f"the plan is not what {shown} shows", *changes, f"If that is meant: {UPDATE}"])
    raise AssertionError(msg)


def _shown(path: Path) -> str:
    """Return a path relative to the current folder if it lies below it."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
