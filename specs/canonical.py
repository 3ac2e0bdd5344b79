"""Records as plain values, and the canonical JSON of a record, from which fingerprints are computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast, get_origin

from attrs import fields, has
from cattrs.gen import make_dict_unstructure_fn, override
from cattrs.preconf.json import make_converter
from cattrs.strategies import configure_tagged_union
from frozendict import deepfreeze, frozendict

from .json_values import thawed
from .param import ParamSpec
from .pipeline import ExampleInput
from .program import What
from .source import Call, Source
from .steps import Step
from .tree import SpecTree

if TYPE_CHECKING:
    import cattrs


def record_converter(*, is_canonical: bool = False) -> cattrs.Converter:
    """Return a converter of all records to plain values and back; each member of a union is tagged with its class.

    Args:
        is_canonical: Whether fields outside equality are left out.
    """
    converter = make_converter(forbid_extra_keys=False)

    def overrides(cls: Any) -> dict[str, Any]:
        """Return the fields of a record that are not always written."""
        if_set = {f.name: override(omit_if_default=True) for f in fields(cls) if f.metadata.get("written") == "if set"}
        never = [f for f in fields(cls) if f.metadata.get("written") == "never" or (is_canonical and not f.eq)]
        return if_set | {f.name: override(omit=True) for f in never}

    def written(cls: Any) -> Callable[[Any], dict[str, Any]]:
        return make_dict_unstructure_fn(cls, converter, **overrides(cls))

    converter.register_unstructure_hook_factory(lambda cls: has(cls) and bool(overrides(cls)), written)
    for union in (What, Call, Source, Step, ExampleInput):  # a union comes before the unions that contain it
        configure_tagged_union(union, converter, tag_name="is")
    converter.register_structure_hook_func(_is_frozendict, lambda value, _: deepfreeze(_expect(value, dict)))
    converter.register_unstructure_hook_func(_is_frozendict, thawed)
    converter.register_structure_hook(SpecTree, lambda value, _: SpecTree(converter.structure(value, tuple[ParamSpec, ...])))
    converter.register_unstructure_hook(SpecTree, lambda tree: [converter.unstructure(spec) for spec in tree.specs])
    return converter


def canonical_fields(record: Any) -> dict[str, str]:
    """Return the canonical JSON of each field of a record: keys sorted, no spaces, only fields that count for equality."""
    plain = cast("dict[str, Any]", _CANONICAL.unstructure(record))
    return {
        name: json.dumps(_equal_as_one(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
        for name, value in sorted(plain.items())
    }


def canonical_json(texts: Mapping[str, str]) -> str:
    """Join the canonical JSON of a record's fields.

    >>> canonical_json({"data": "1", "pipe": "2"})
    '{"data":1,"pipe":2}'
    """
    return f"{{{','.join(f'{json.dumps(name)}:{text}' for name, text in texts.items())}}}"


def _is_frozendict(cls: Any) -> bool:
    return cls is frozendict or get_origin(cls) is frozendict


def _equal_as_one(value: Any) -> Any:
    """Write equal numbers alike: 1 for 1.0 and True."""
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


_CANONICAL = record_converter(is_canonical=True)
