"""Plans as JSON, and back: never pickle."""

from __future__ import annotations

import json
from typing import Any, cast

import cattrs
from cattrs.v import format_exception

from .canonical import record_converter
from .errors import PlanError, Problem
from .plan import SCHEMA_VERSION, Plan


def dumps(plan: Plan) -> str:
    """Return a plan as JSON.

    Raises:
        PlanError: If it calls a lambda or a closure, which no other process can find by name.
    """
    problems = [
        Problem(
            name,
            "a lambda, closure or other nameless function runs, but cannot be saved",
            "Define it with 'def' at the top level of a module that can be imported",
        )
        for name in plan.callables
        if is_nameless(name)
    ]
    if problems:
        raise PlanError(problems)
    data = {**_CONVERTER.unstructure(plan), "fingerprint": plan.fingerprint}
    return json.dumps(data, indent=1, allow_nan=False)


def loads(text: str) -> Plan:
    """Return the plan that ``dumps`` wrote. Its model is given to ``execute``; its callables are imported there.

    Raises:
        PlanError: If the text is no JSON, is of another schema version, or is damaged; it says where.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError([_damage(f"it is no JSON: {error}")]) from None
    if not isinstance(data, dict):
        raise PlanError([_damage(f"it is a JSON {type(data).__name__}, not an object")])
    data = cast("dict[str, Any]", data)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        cause = f"its schema version is {version!r}, and this shardplan reads {SCHEMA_VERSION}"
        raise PlanError([Problem("plan", cause, "Plan again with this version, or load it with the one that wrote it")])
    try:
        plan = _CONVERTER.structure(data, Plan)
    except cattrs.BaseValidationError as error:
        raise PlanError([_damage("; ".join(cattrs.transform_error(error, path="plan", format_exception=_format)))]) from None
    if json.loads(json.dumps({**_CONVERTER.unstructure(plan), "fingerprint": data.get("fingerprint")})) != data:
        raise PlanError([_damage("it has fields or values that no plan writes")])
    if data.get("fingerprint") != plan.fingerprint:
        raise PlanError([_damage(f"its fingerprint says {data.get('fingerprint')!r}, its contents {plan.fingerprint!r}")])
    return plan


def as_plain(record: Any) -> Any:
    """Return a record, such as a report, as values that JSON knows.

    >>> from shardplan.specs import Mesh
    >>> as_plain(Mesh(tensor=2))
    {'pipe': 1, 'data': 1, 'tensor': 2, 'expert': 1}
    """
    return _CONVERTER.unstructure(record)


def is_nameless(name: str) -> bool:
    """Tell whether a callable's ``module:qualname`` leads nowhere: a lambda, a closure, an object.

    >>> is_nameless("train:init"), is_nameless("train:main.<locals>.init"), is_nameless("train:<lambda>")
    (False, True, True)
    """
    return "<" in name


def _damage(cause: str) -> Problem:
    return Problem("plan", f"it is damaged: {cause}", "Plan again, or copy the file again")


def _format(error: BaseException, cls: type | None) -> str:
    match error:
        case PlanError(problems=problems):
            return "; ".join(
                f"{'  '.join(filter(None, (problem.path, problem.type)))}: {problem.cause}" for problem in problems
            )
        case ValueError() | KeyError():
            return f"{format_exception(error, cls)} ({error})"
        case _:
            return format_exception(error, cls)


_CONVERTER = record_converter()
