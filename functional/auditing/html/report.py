"""A plan and its audit as one page of HTML that works from a file, e.g. attached to a pull request, without a network."""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import TYPE_CHECKING, Any

from ....specs.dtypes import human_bytes
from ....specs.mesh import MESH_AXES
from .memory import memory
from .mesh import mesh
from .tensors import tensors
from .traffic import traffic
from .types import types
from .verdicts import verdicts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan
    from ....specs.report import Report

_SCRIPTS = ("dom", "tip", "head", "verdicts", "mesh", "memory", "traffic", "search", "tensors", "types", "page")
"""The scripts of the page, each after the scripts that it uses."""

_SECTIONS = ("findings", "proofs", "mesh", "memory", "traffic", "tensors", "types")
"""The sections of the page in their order; a function of a script draws each: ``drawFindings``, ..."""

_SLOT = re.compile(r"\{\{(\w+)\}\}")
_ESCAPES = str.maketrans({"<": r"\u003c", ">": r"\u003e", "&": r"\u0026"})
"""Characters that could end a script or begin a comment, as JSON strings may write them; JSON has them in strings alone."""


def html_report(plan: Plan, report: Report) -> str:
    """Return a report as one self-contained page of HTML.

    Every number on it comes from the report or the plan. The page holds them as JSON, and a script that is the same for all
    reports draws them. The page's content security policy forbids loading anything and running any other script.

    Args:
        plan: The plan.
        report: Its audit.

    >>> from shardplan.functional import audit
    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> plan = Plan(Mesh(data=2), SpecTree([ParamSpec("</script>", (4, 4), "float32")]), steps=())
    >>> page = html_report(plan, audit(plan))
    >>> page.count("</script>"), plan.fingerprint in page
    (2, True)
    """
    data = {
        **_head(plan, report),
        "verdicts": verdicts(report),
        "mesh": mesh(report),
        "memory": memory(report),
        "traffic": traffic(report),
        "tensors": tensors(plan, report),
        "types": types(plan),
    }
    style, script = _asset("report.css"), _script()
    slots = {
        "title": html.escape(report.title),
        "data": json.dumps(data, separators=(",", ":")).translate(_ESCAPES),
        "links": "\n".join(f'  <a href="#{name}">{name.title()}</a>' for name in _SECTIONS),
        "sections": "\n".join(map(_section, _SECTIONS)),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
    }
    return _SLOT.sub(lambda slot: slots[slot[1]], _asset("report.html"))


def _section(name: str) -> str:
    """Return the heading of a section, and the element that its script draws into."""
    heading = f'<h2 id="{name}-title">{name.title()}</h2>'
    return f'  <section id="{name}" aria-labelledby="{name}-title">{heading}<div class="body"></div></section>'


def _head(plan: Plan, report: Report) -> dict[str, Any]:
    """Return the head of the page: the plan, the verdict, the facts."""
    return {
        "heading": report.title.partition(",")[0],
        "fingerprint": plan.fingerprint,
        "ok": report.ok,
        "verdict": _verdict(report),
        "num_errors": sum(finding.severity == "error" for finding in report.findings),
        "num_warnings": sum(finding.severity == "warning" for finding in report.findings),
        "num_silenced": len(report.silenced),
        "num_stages": plan.mesh.pipe,
        "facts": [list(fact) for fact in _facts(plan, report)],
    }


def _verdict(report: Report) -> str:
    if report.ok:
        return f"execute takes this plan, {report.verdict.removeprefix('yes, ')}"
    return report.verdict.removeprefix("no: ")


def _facts(plan: Plan, report: Report) -> Iterator[tuple[str, str]]:
    mesh, worst = plan.mesh, report.worst
    axes = " × ".join(f"{mesh_axis} {mesh.num(mesh_axis)}" for mesh_axis in MESH_AXES)
    yield "mesh", f"{axes}, expert {mesh.expert}" if mesh.expert > 1 else axes
    yield "ranks", f"{mesh.num_ranks:,}"
    yield "target", plan.target or "none"
    yield "tensors", f"{len(plan.tree):,}"
    yield "most memory", f"{human_bytes(worst.memory.peak_bytes)} on rank {worst.coordinate.rank}"
    if report.device_memory is not None:
        yield "a device has", human_bytes(report.device_memory)
    if report.ranks_per_node is not None:
        yield "ranks a node", f"{report.ranks_per_node:,}"
    if report.host_peak_bytes:
        yield "host memory a node", human_bytes(report.host_peak_bytes)
    yield "micro-batches a step", f"{report.num_microbatches:,}"
    yield "seed", str(plan.seed)


@cache
def _script() -> str:
    return "\n".join(['"use strict";', *(_asset(f"{name}.js") for name in _SCRIPTS)])


@cache
def _asset(name: str) -> str:
    return resources.files(str(__package__)).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the name of an allowed script or style in a content security policy."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
