"""A sentence for each tensor: why it is split, or stays whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ....specs.paths import join, module_of, name_of
from ...model.linear import linear_of, overrides_forward
from .factors import Axis, Factor, representative, segments, spell
from .regions import RefusedRegion, Region

if TYPE_CHECKING:
    from ....specs.param import ParamSpec
    from ...schedule import Schedule
    from .propagate import ModelAxes
    from .vocabularies import Vocabulary

_FEW = 3


def reasons(
    sch: Schedule,
    found: ModelAxes,
    outcomes: Iterable[Region | RefusedRegion],
    tables: Iterable[Vocabulary],
    small: Mapping[str, str],
) -> dict[str, str]:
    """Return a sentence for each tensor, by canonical path."""
    sentences: dict[str, str] = {}
    refused: dict[str, str] = {}
    for outcome in outcomes:
        if isinstance(outcome, RefusedRegion):
            refused |= {module: outcome.reason for module in outcome.modules if module not in refused}
        else:
            for path, why in _of_region(sch, outcome):
                sentences.setdefault(sch.tree[path].path, why)
    for table in tables:
        sentences[table.table] = _of_table(table)
        for head in table.heads:
            sentences[sch.tree[f"{head}.weight"].path] = _of_table(table)
            if spec := sch.tree.get(f"{head}.bias"):
                sentences[spec.path] = "split like the rows whose scores it is added to, which are then joined"
    for spec in sch.tree.values():
        if spec.path not in sentences:
            sentences[spec.path] = _of_whole(found, spec, refused, small)
    return sentences


def _of_region(sch: Schedule, region: Region) -> Iterator[tuple[str, str]]:
    what = _what(region)
    for module, split in region.columns.items():
        each = f" of {split['granule']}" if "granule" in split else ""
        how = ", repeated on neighbouring ranks" if split.get("replicate") else ""
        why = f"its outputs are {what}{each}, which nothing mixes before {_names(region.rows)} sums over them{how}"
        for name in ("weight", "bias"):
            if (path := join(module, name)) in sch.tree:
                yield path, why
    for module in region.rows:
        why = f"it sums over the {what} that {_names(region.columns)} gives; the ranks' sums are added up"
        yield join(module, "weight"), why
        if (path := join(module, "bias")) in sch.tree:
            yield path, "whole: it is added once, after the ranks' sums are added up"
    for path, (axis, _) in region.tensors.items():
        yield path, f"its axis {axis} has the {what} that {_names(region.columns)} gives, and is split alike"
    for path in region.sums.parameters:
        yield path, f"whole: it works on all {what} alike, and its gradient is summed over the ranks"


def _what(region: Region) -> str:
    size = region.leaf.size
    return f"{size} groups of heads" if region.repeated else f"{size} heads" if region.is_attention else f"{size} features"


def _of_table(table: Vocabulary) -> str:
    lookup = "each rank looks up the rows that it has, and others give zeros" if table.embeddings else ""
    score = f"{_names(table.heads)} scores them, and the scores are joined" if table.heads else ""
    return "; ".join(part for part in (lookup, score) if part)


def _of_whole(  # noqa: PLR0911  a return for each reason
    found: ModelAxes, spec: ParamSpec, refused: Mapping[str, str], small: Mapping[str, str]
) -> str:
    module = module_of(spec.path)
    if spec.path in small:
        return f"whole: {small[spec.path]}"
    for path in spec.paths:
        if (owner := module_of(path)) in refused:
            return f"whole: {refused[owner]}"
    tensor = found.tensors.get(spec.path)
    if tensor is None:
        return "whole: nothing in this forward pass reads it"
    owner = found.model.get_submodule(module)
    kind = linear_of(owner)
    if kind is not None and len(tensor.axes) > 1:
        if overrides_forward(owner):
            return f"whole: its {type(owner).__name__} computes in a way of its own, not as a linear module does"
        out, into = _reason(tensor.axes[kind.out_axis]), _reason(tensor.axes[kind.in_axis])
        if out and into:
            return f"whole: of its outputs, {out}; of its inputs, {into}"
        return "whole: of its outputs, no linear module sums over them" if into else f"whole: of its outputs, {out}"
    reason = next(filter(None, map(_reason, reversed(tensor.axes))), "")
    return f"whole: it works on whole activations{f', as of these {reason}' if reason else ''}"


def _reason(axis: Axis) -> str:
    return next((factor.reason for factor in _leaves(axis) if factor.reason), "")


def _leaves(axis: Iterable[Factor]) -> Iterator[Factor]:
    for factor in spell(axis):
        yield representative(factor)
        if factor.kind == "sum":
            for inner in segments(factor):
                yield from _leaves((inner,)) if inner is not factor else ()


def _names(modules: Iterable[str]) -> str:
    names = list(dict.fromkeys(name_of(module) for module in modules))
    return ", ".join(names[:_FEW]) + (" and others" if len(names) > _FEW else "")
