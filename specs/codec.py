"""Plans as JSON, and back: never pickle."""

from __future__ import annotations

import json
from typing import Any, cast, get_origin

import cattrs
from cattrs.gen import make_dict_unstructure_fn, override
from cattrs.preconf.json import make_converter
from cattrs.strategies import configure_tagged_union
from cattrs.v import format_exception
from frozendict import deepfreeze, frozendict

from .errors import PlanError, Problem
from .json_values import thawed
from .param import ParamSpec
from .pipeline import ExampleInput
from .plan import SCHEMA_VERSION, Plan
from .program import Constant, What
from .source import Call, Source
from .steps import Step
from .tree import SpecTree


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
    data = {**_WITH_ORIGINS.unstructure(plan), "fingerprint": plan.fingerprint}
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
        plan = _WITH_ORIGINS.structure(data, Plan)
    except cattrs.BaseValidationError as error:
        raise PlanError([_damage("; ".join(cattrs.transform_error(error, path="plan", format_exception=_format)))]) from None
    if json.loads(json.dumps({**_WITH_ORIGINS.unstructure(plan), "fingerprint": data.get("fingerprint")})) != data:
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
    return _WITH_ORIGINS.unstructure(record)


def canonical_fields(plan: Plan) -> dict[str, str]:
    """Return the one JSON text of each field of a plan: sorted keys, no spaces, no origins, no values of constants."""
    fields = cast("dict[str, Any]", _CANONICAL.unstructure(plan))
    return {
        name: json.dumps(_equal_as_one(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
        for name, value in sorted(fields.items())
    }


def canonical_json(plan: Plan) -> str:
    """Return the one JSON text of a plan, without what is outside equality."""
    return f"{{{','.join(f'{json.dumps(name)}:{text}' for name, text in plan.canonical_fields.items())}}}"


def is_nameless(name: str) -> bool:
    """Tell whether a callable's ``module:qualname`` leads nowhere: a lambda, a closure, an object.

    >>> is_nameless("train:init"), is_nameless("train:main.<locals>.init"), is_nameless("train:<lambda>")
    (False, True, True)
    """
    return "<" in name


def _damage(cause: str) -> Problem:
    return Problem("plan", f"it is damaged: {cause}", "Plan again, or copy the file again")


def _converter(*, origins: bool) -> cattrs.Converter:
    converter = make_converter(forbid_extra_keys=False)
    converter.register_unstructure_hook(
        Constant, make_dict_unstructure_fn(Constant, converter, values=override(omit=not origins))
    )
    for union in (What, Call, Source, Step, ExampleInput):  # what the later ones contain comes first
        configure_tagged_union(union, converter, tag_name="is")
    converter.register_structure_hook_func(
        lambda cls: cls is frozendict or get_origin(cls) is frozendict,
        lambda value, _: deepfreeze(_expect(value, dict)),
    )
    converter.register_unstructure_hook_func(lambda cls: cls is frozendict or get_origin(cls) is frozendict, thawed)
    converter.register_structure_hook(SpecTree, lambda value, _: SpecTree(converter.structure(value, tuple[ParamSpec, ...])))
    converter.register_unstructure_hook(SpecTree, lambda tree: [converter.unstructure(spec) for spec in tree.specs])
    converter.register_unstructure_hook(
        ParamSpec,
        make_dict_unstructure_fn(ParamSpec, converter, origin=override(omit=not origins)),
    )
    converter.register_unstructure_hook(Plan, make_dict_unstructure_fn(Plan, converter, runtime=override(omit=True)))
    return converter


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


def _equal_as_one(value: Any) -> Any:
    """Write numbers that are equal in one way: 1 for 1.0 and True."""
    kind = cast("type[object]", type(value))  # a plan of 5,000 tensors has 100,000 values
    if kind is str or kind is int:
        return value
    if kind is dict:
        return {key: _equal_as_one(item) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [_equal_as_one(item) for item in value]
    return int(value) if kind is bool or (kind is float and value.is_integer()) else value


def _expect(value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        msg = f"expected {kind.__name__}, found {value!r}"
        raise TypeError(msg)
    return value


_WITH_ORIGINS = _converter(origins=True)
_CANONICAL = _converter(origins=False)
