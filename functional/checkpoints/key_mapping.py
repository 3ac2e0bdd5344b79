"""Map keys of a checkpoint to paths of a model and back, as transformers declares it, without a tensor.

The code follows ``convert_and_load_state_dict_in_model``, ``revert_weight_conversion`` and
``remove_tied_weights_from_state_dict`` of transformers 5, with boxes of stored tensors in place of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ...specs.errors import PlanError, Problem
from ...specs.paths import join
from ...specs.stored import Part, StoredTensor
from ..model.read import named_tensors
from .assembly import Assembly
from .key_transforms import convert

if TYPE_CHECKING:
    from torch import nn

    from ...specs.param import ParamSpec
    from ...specs.stored import Contents
    from ...specs.tree import SpecTree

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_FIX = "Load it with transformers once, and write it with save_pretrained(folder, save_original_format=False)"


@frozen
class MappedCheckpoint:
    """The tensors of a checkpoint under a model's names.

    Args:
        tensors: The stored tensor for each path of the model; tied tensors may appear under any of their paths.
        extra: Keys that no tensor of the model uses, and why.
        problems: Tensors that cannot be assembled.
        failed: Paths of the tensors with problems.
    """

    tensors: Mapping[str, Assembly]
    extra: Mapping[str, str]
    problems: tuple[Problem, ...]
    failed: frozenset[str]


@frozen
class TensorToSave:
    """A tensor of a checkpoint to be written.

    Args:
        key: Its key in the checkpoint.
        shape: Its shape in the checkpoint.
        dtype: torch's name of its element type.
        parts: Its parts. In them the whole tensors of the model, by canonical path, stand for stored tensors; an axis of
            such a tensor that ``axes`` leaves out has size 1 in the box.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]


def map_checkpoint(model: nn.Module, tree: SpecTree, contents: Contents) -> MappedCheckpoint:
    """Map the keys of a checkpoint to the tensors of a model, by the renamings and conversions that transformers declares.

    For a model that is not from transformers the keys are the paths.
    """
    names = {path: True for spec in tree.values() if spec.kind != "non_persistent_buffer" for path in spec.paths}
    if not is_pretrained(model):
        extra = {key: "the model has no tensor of this name" for key in contents.tensors if key not in names}
        groups = {key: _KeyGroup(None, {"": [key]}) for key in contents.tensors if key in names}
    else:
        groups, extra = _grouped(model, names, contents.tensors)
    found: dict[str, Assembly] = {}
    problems: list[Problem] = []
    failed: set[str] = set()
    for name, group in groups.items():
        try:
            stored = {pattern: [Assembly.of(contents.tensors[key]) for key in keys] for pattern, keys in group.keys.items()}
            made = _convert(group.converter, stored, name, model, tree)
        except ValueError as error:
            problems.append(Problem(name, str(error), _FIX if group.converter else "Write the checkpoint again"))
            failed.update(_targets(group.converter, name))
            continue
        for path, assembly in made.items():
            if path in names and path not in found:
                found[path] = assembly
            else:
                cause = (
                    f"{path} is made of it, and {'has its values already' if path in names else 'the model has not that'}"
                )
                extra |= dict.fromkeys(assembly.keys, cause)
    return MappedCheckpoint(found, extra, tuple(problems), frozenset(failed))


def may_be_missing(model: nn.Module) -> Callable[[str], bool]:
    """Return a predicate for paths that checkpoints may lack, as transformers declares."""
    return _any_of(getattr(model, "_keys_to_ignore_on_load_missing", None) if is_pretrained(model) else None)


def stored_form(model: nn.Module, tree: SpecTree) -> tuple[TensorToSave, ...]:
    """Return the tensors that ``save_pretrained`` writes, in its order, with keys and shapes of the original checkpoint.

    Tied tensors are written once. Models that are not from transformers are written by canonical path.

    Raises:
        PlanError: If the original form needs an operation that cannot be done to boxes of tensors.
    """
    whole = {
        name: Assembly.of([Part.whole(StoredTensor("", spec.path, 0, spec.orig_shape, spec.dtype))])
        for name, spec in saved_tensors(model, tree)
    }
    if is_pretrained(model):
        whole = _reverted(model, tree, whole)
    return tuple(TensorToSave(key, one.shape, one.parts[0].stored.dtype, one.parts) for key, one in whole.items())


def saved_tensors(model: Any, tree: SpecTree) -> Iterator[tuple[str, ParamSpec]]:
    """Iterate over tensors with the names they are saved under, in the order of ``state_dict``; tied tensors come once."""
    persistent = [path for path, kind, _ in named_tensors(model) if kind != "non_persistent_buffer"]
    pretrained = is_pretrained(model)
    dropped = set((model._keys_to_ignore_on_save or ()) if pretrained else ())  # noqa: SLF001  there is no public name
    is_tie = _any_of(_tie_patterns(model) if pretrained else None)
    left: dict[str, list[str]] = {}
    for path in persistent:
        if path not in dropped:
            left.setdefault(tree[path].path, []).append(path)
    kept = {
        (next((path for path in paths if not is_tie(path)), max(paths)) if pretrained else paths[0]): canonical
        for canonical, paths in left.items()
    }
    for path in persistent:
        if path in kept:
            yield path, tree[path]


def family(path: str) -> str:
    """Replace the numbers in a path by ``*``: the pattern of its repeats.

    >>> family("model.layers.11.mlp.experts.3.w1.weight")
    'model.layers.*.mlp.experts.*.w1.weight'
    """
    return _NUMBER.sub("*", path)


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether a model is from transformers."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.partition(".")[0] == "transformers"
        for cls in type(model).__mro__
    )


@frozen
class _KeyGroup:
    """The keys, by the pattern that matched them, that a conversion turns into tensors of the model."""

    converter: Any
    keys: dict[str, list[str]]


def _grouped(model: Any, names: dict[str, bool], keys: Iterable[str]) -> tuple[dict[str, _KeyGroup], dict[str, str]]:
    """Group the keys by the (first) path they contribute to; return the groups, and the unused keys with the cause."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters, by_pattern = _by_kind(get_model_conversion_mapping(model))
    is_ignored = _any_of(_ignored(model))
    groups: dict[str, _KeyGroup] = {}
    extra: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
        converter = None if pattern is None else by_pattern[pattern]
        if name in names:
            group = groups.setdefault(name, _KeyGroup(converter, {}))
            if group.converter is not converter or (converter is None and group.keys):
                first = next(iter(group.keys.values()))[0]
                extra[key] = f"it gives {name}, which {first} gives too"
            else:
                group.keys.setdefault(pattern or "", []).append(key)
            continue
        made = _targets(converter, name)
        if not all(map(is_ignored, made)):
            extra[key] = f"the model has no tensor {made[0]}" if made[0] != key else "the model has no tensor of this name"
    return groups, extra


def _by_kind(transforms: Iterable[Any]) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Return the renamings and the converters among declared transforms, and the converters by source pattern."""
    from transformers.core_model_loading import WeightRenaming

    kinds: dict[bool, list[Any]] = {True: [], False: []}
    for transform in transforms:
        kinds[isinstance(transform, WeightRenaming)].append(transform)
    return kinds[True], kinds[False], {pattern: one for one in kinds[False] for pattern in one.source_patterns}


def _targets(converter: Any, name: str) -> list[str]:
    """Return the names of all tensors that a conversion yields, given the first."""
    targets = [] if converter is None else converter.target_patterns
    return [name.replace(targets[0], target) for target in targets] or [name]


def _ignored(model: Any) -> set[str]:
    """Return patterns of keys in old checkpoints that transformers ignores."""
    buffers = [path for path, _ in model.named_buffers()]
    patterns: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001  there is no public name
    if any(path.endswith("rotary_emb.inv_freq") for path in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(path.endswith("position_ids") for path in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def _any_of(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    compiled = [re.compile(pattern) for pattern in patterns or ()]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def _convert(
    converter: Any, stored: Mapping[str, list[Assembly]], name: str, model: Any, tree: SpecTree
) -> dict[str, Assembly]:
    if converter is None:
        (only,) = next(iter(stored.values()))
        return {name: only}
    return convert(converter, stored, name, lambda path: tree[path].orig_shape, model.config)


def _tie_patterns(model: Any) -> Iterator[str]:
    """Iterate over patterns of the tied paths that transformers leaves out when it saves."""
    for path, module in model.named_modules():
        for pattern in getattr(module, "_tied_weights_keys", None) or ():
            yield join(path, pattern)


def _reverted(model: Any, tree: SpecTree, whole: Mapping[str, Assembly]) -> dict[str, Assembly]:
    """Return tensors under the keys, and in the shapes, of the original checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, dot_natural_key, rename_source_key

    transforms: list[Any] | None = getattr(model, "_weight_conversions", None)
    if transforms is None:
        declared = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [one for one in declared if not isinstance(one, PrefixChange)]
        if not transforms:
            return dict(whole)
    renamings, converters, by_pattern = _by_kind([one.reverse_transform() for one in reversed(transforms)])
    groups: dict[str, tuple[Any, dict[str, list[Assembly]]]] = {}
    for path in sorted(whole, key=dot_natural_key):
        name, pattern = rename_source_key(path, [], converters)
        if pattern is None:
            name, _ = rename_source_key(path, renamings, [])
        converter = None if pattern is None else by_pattern[pattern]
        groups.setdefault(name, (converter, {}))[1].setdefault(pattern or path, []).append(whole[path])
    found: dict[str, Assembly] = {}
    problems: list[Problem] = []
    for name, (converter, stored) in groups.items():
        try:
            made = _convert(converter, stored, name, model, tree)
        except ValueError as error:
            paths = [key for ones in stored.values() for one in ones for key in one.keys]
            cause = f"its original form {family(name)} cannot be made: {error}"
            problems.append(Problem(paths[0], cause, "Save it under the model's own names: format='dcp'"))
            continue
        for key, one in made.items():
            found[key if converter is None else rename_source_key(key, renamings, [])[0]] = one
    if problems:
        raise PlanError(problems)
    return found
