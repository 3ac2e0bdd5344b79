"""A plan and its audit as one page: read from a file, attached to a pull request, without a network. No torch."""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import TYPE_CHECKING

from .findings import verdicts
from .header import head
from .memory import memory
from .mesh import mesh
from .tensors import tensors
from .traffic import traffic

if TYPE_CHECKING:
    from ....specs.plan import Plan
    from ....specs.report import Report

_SCRIPTS = ("dom", "tip", "head", "verdicts", "mesh", "memory", "traffic", "search", "tensors", "page")
"""In the order in which one needs the other."""

_SLOT = re.compile(r"\{\{(\w+)\}\}")
_ESCAPES = str.maketrans({"<": r"\u003c", ">": r"\u003e", "&": r"\u0026"})
"""What could end a script or begin a comment, as JSON writes it within a string; elsewhere JSON has none of them."""


def html_report(plan: Plan, report: Report) -> str:
    """Return a report as one page of HTML that needs nothing besides itself.

    Every number on it is the report's or the plan's. They stand in the page as JSON, and a script that is the same for all
    reports draws them. A policy in the page keeps it from loading anything, and from running any other script.

    Args:
        plan: The plan.
        report: What the audit says of it.

    >>> from shardplan.functional import audit
    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> plan = Plan(Mesh(data=2), SpecTree([ParamSpec("</script>", (4, 4), "float32")]), steps=())
    >>> page = html_report(plan, audit(plan))
    >>> page.count("</script>"), plan.fingerprint in page
    (2, True)
    """
    data = {
        **head(plan, report),
        "verdicts": verdicts(report),
        "mesh": mesh(report),
        "memory": memory(report),
        "traffic": traffic(report),
        "tensors": tensors(plan, report),
    }
    style, script = _asset("report.css"), _script()
    slots = {
        "title": html.escape(report.title),
        "data": json.dumps(data, separators=(",", ":")).translate(_ESCAPES),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
    }
    return _SLOT.sub(lambda slot: slots[slot[1]], _asset("report.html"))


@cache
def _script() -> str:
    return "\n".join(['"use strict";', *(_asset(f"{name}.js") for name in _SCRIPTS)])


@cache
def _asset(name: str) -> str:
    return resources.files(str(__package__)).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return how a content security policy names a script or a style that it allows."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
