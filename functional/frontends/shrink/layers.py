"""The layers of a small model: two of each kind, in their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...model.config_fields import Field

_DEPTH = re.compile(r"(^|_)(layers?|depth|blocks)$")
_NO_DEPTH = re.compile(
    r"shared_layer|nextn|dense_layer|window_layers|residual_layer|adapter_layer|feature_layer|_(every|per)_"
)
_DEPTHS = re.compile(r"^depths$|^depth$|blocks_per_stage$|^stage_num(b_of_layers|_blocks)$")
_FIRST = re.compile(r"^first_|dense_layers$|max_window_layers|moe_layer_start|num_hash_layers")
_LAST = re.compile(r"shared_layers$")
_INDEXES = re.compile(r"ind(ex|exes|ices)$|idxs?$|_layers?$|_ids$|_blocks$")
_NUM = 2

Kept = Mapping[int, Sequence[int]]
"""Numbers of the layers that are kept, by the number of layers of their stack."""


def stacks(model: nn.Module) -> dict[str, list[object]]:
    """Return the stacks of a model by path: for each layer, all that tells it from layers of another kind."""
    return {
        path: [_looks(layer) for layer in module]
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }


def without_numbers(path: str) -> str:
    """Return a path with a star for each number, so that it is the same in all layers.

    >>> without_numbers("layers.11.experts.0.w1")
    'layers.*.experts.*.w1'
    """
    return ".".join("*" if name.isdigit() else name for name in path.split("."))


def layers_of_each_kind(fields: Sequence[Field], model: nn.Module) -> Kept:
    """Return the first two layers of each kind, for each number of layers."""
    return {depth: _first(_NUM, kinds) for depth, kinds in _kinds(fields, model).items()}


def layers_from_the_start(fields: Sequence[Field], model: nn.Module, num: int = _NUM) -> Kept:
    """Return all layers up to those that make two of each kind, for configurations that count layers by periods."""
    return {depth: range(_first(num, kinds)[-1] + 1) for depth, kinds in _kinds(fields, model).items()}


def layer_changes(fields: Sequence[Field], kept: Kept) -> dict[Field, Any]:
    """Return the fields that count or list layers, for the layers that are kept."""
    changes: dict[Field, Any] = {}
    for of in fields:
        found = _depth_of(fields, of, kept)
        if is_depth(of) and of.number in kept:
            changes[of] = len(kept[of.number])
        elif _DEPTHS.search(of.name) and of.numbers:
            changes[of] = type(of.value)(min(_NUM, number) for number in of.numbers)
        elif isinstance(of.value, (list, tuple)) and len(of.value) in kept and not _is_index_list(of, len(of.value)):
            changes[of] = type(of.value)(of.value[at] for at in kept[len(of.value)])
        elif found and (chosen := _renumbered(of, found, kept[found])) is not None:
            changes[of] = chosen
    return {of: value for of, value in changes.items() if value != of.value}


def is_depth(field: Field) -> bool:
    """Tell whether a field holds a number of layers, by its name."""
    return bool(_DEPTH.search(field.name)) and not _NO_DEPTH.search(field.name) and field.number > 0


def _looks(layer: nn.Module) -> object:
    classes = {type(module).__name__ for module in layer.modules()}
    return classes, {without_numbers(name) for name, _ in layer.named_parameters()}


def _kinds(fields: Sequence[Field], model: nn.Module) -> dict[int, list[object]]:
    """Return the kinds of layers, for each number of layers: by their looks and by all that the configuration lists."""
    built = stacks(model)
    depths = {of.number for of in fields if is_depth(of) and of.number > _NUM}
    found: dict[int, list[object]] = {}
    for depth in depths & {len(layers) for layers in built.values()}:
        told = [layers for layers in built.values() if len(layers) == depth]
        for of in fields:
            told += [kinds] if (kinds := _told_by(fields, of, depth)) and len(set(map(repr, kinds))) <= depth // _NUM else []
        found[depth] = [tuple(map(_spelled, kinds)) for kinds in zip(*told, strict=True)]
    return found


def _spelled(kind: object) -> object:
    return tuple(map(frozenset, kind)) if isinstance(kind, tuple) else repr(kind)


def _told_by(fields: Sequence[Field], of: Field, depth: int) -> list[object]:
    """Return what a field tells of each layer; empty if nothing."""
    if isinstance(of.value, (list, tuple)) and len(of.value) == depth and not _is_index_list(of, depth):
        return list(of.value)
    if _depth_of(fields, of, {depth: ()}) != depth:
        return []
    if _FIRST.search(of.name) and of.number:
        return [at < of.number for at in range(depth)]
    if _LAST.search(of.name) and of.number:
        return [at >= depth - of.number for at in range(depth)]
    if _is_index_list(of, depth):
        return [at in of.numbers or at - depth in of.numbers for at in range(depth)]
    return []


def _depth_of(fields: Sequence[Field], of: Field, kept: Mapping[int, object]) -> int:
    """Return the number of layers of the stack that a field's layer numbers belong to; 0 if there is none."""
    config = (*of.config, "vision_config") if of.name.startswith("vision_feature") else of.config
    near = [other.number for other in fields if other.config == config and is_depth(other) and other.number in kept]
    return max(near, default=0)


def _is_index_list(field: Field, depth: int) -> bool:
    numbers = field.numbers
    is_sorted = list(numbers) == sorted(set(numbers)) and all(-depth <= number < depth for number in numbers)
    return bool(numbers) and is_sorted and bool(_INDEXES.search(field.name))


def _renumbered(of: Field, depth: int, kept: Sequence[int]) -> object:
    """Return a field's numbers of layers, for the layers that are kept; None if it holds no such numbers."""
    place = {number: at for at, number in enumerate(kept)}
    if _FIRST.search(of.name):
        return sum(number < of.number for number in kept)
    if _LAST.search(of.name):
        return sum(number >= depth - of.number for number in kept)
    if _is_index_list(of, depth):
        return type(of.value)(place[number % depth] for number in of.numbers if number % depth in place)
    if of.name.startswith("vision_feature") and of.number and not -len(kept) <= of.number < len(kept):
        return len(kept) - 1 if of.number > 0 else -1
    return None


def _first(num: int, kinds: Iterable[object]) -> list[int]:
    """Return the places of the first few of each kind."""
    seen: Counter[object] = Counter()
    places: list[int] = []
    for at, kind in enumerate(kinds):
        if seen[kind] < num:
            places.append(at)
        seen[kind] += 1
    return places
