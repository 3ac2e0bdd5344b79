"""Names in a checkpoint and names in a model: the mapping that transformers itself declares, followed without a tensor.

It follows ``convert_and_load_state_dict_in_model``, ``revert_weight_conversion`` and
``remove_tied_weights_from_state_dict`` of transformers 5, with boxes of stored tensors in place of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ...specs.errors import PlanError, Problem
from ...specs.stored import Part, StoredTensor
from ..model.read import named_tensors
from .assembly import Assembly
from .key_transforms import converted

if TYPE_CHECKING:
    from torch import nn

    from ...specs.param import ParamSpec
    from ...specs.stored import Contents
    from ...specs.tree import SpecTree

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_FIX = "Load it with transformers once, and write it with save_pretrained(folder, save_original_format=False)"


@frozen
class Served:
    """What a checkpoint has for a model.

    Args:
        tensors: What is stored for a path of the model's; of tied ones any may be there.
        extra: Keys that nothing is made of, and why.
        problems: What cannot be made.
        failed: Paths that they are about.
    """

    tensors: Mapping[str, Assembly]
    extra: Mapping[str, str]
    problems: tuple[Problem, ...]
    failed: frozenset[str]


@frozen
class Kept:
    """A tensor of a checkpoint that is written.

    Args:
        key: Its name there.
        shape: Its shape there.
        dtype: torch's name of its element type.
        parts: What it is made of. What they name as stored are whole tensors of the model, by canonical path; an axis of
            those that a part's ``axes`` leave out has one entry in its box.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]


def model_parts(model: nn.Module, tree: SpecTree, contents: Contents) -> Served:
    """Return what a checkpoint has for each tensor of a model, by the names that transformers declares.

    Keys of a model that is not transformers' are its paths.

    Args:
        model: The model; it is not changed.
        tree: Its tensors.
        contents: The checkpoint.
    """
    names = {path: True for spec in tree.values() if spec.kind != "non_persistent_buffer" for path in spec.paths}
    if not is_pretrained(model):
        extra = {key: "the model has no tensor of this name" for key in contents.tensors if key not in names}
        groups = {key: _Group(None, {"": [key]}) for key in contents.tensors if key in names}
    else:
        groups, extra = _grouped(model, names, contents.tensors)
    found: dict[str, Assembly] = {}
    problems: list[Problem] = []
    failed: set[str] = set()
    for name, group in groups.items():
        try:
            stored = {pattern: [Assembly.of(contents.tensors[key]) for key in keys] for pattern, keys in group.keys.items()}
            made = _made(group.converter, stored, name, model, tree)
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
    return Served(found, extra, tuple(problems), frozenset(failed))


def may_be_missing(model: nn.Module) -> Callable[[str], bool]:
    """Return what tells of a path whether transformers declares that checkpoints may lack it."""
    return _any_of(getattr(model, "_keys_to_ignore_on_load_missing", None) if is_pretrained(model) else None)


def stored_form(model: nn.Module, tree: SpecTree) -> tuple[Kept, ...]:
    """Return what ``save_pretrained`` writes of a model, in its order: names and shapes of the original checkpoint.

    Of tied tensors one is written. Other models than transformers' are written by canonical path.

    Args:
        model: The model; it is not changed.
        tree: Its tensors.

    Raises:
        PlanError: If an operation that the original form needs cannot be done to boxes of tensors.
    """
    whole = {
        name: Assembly.of([Part.whole(StoredTensor("", spec.path, 0, spec.orig_shape, spec.dtype))])
        for name, spec in saved_tensors(model, tree)
    }
    if is_pretrained(model):
        whole = _reverted(model, tree, whole)
    return tuple(Kept(key, one.shape, one.parts[0].stored.dtype, one.parts) for key, one in whole.items())


def saved_tensors(model: Any, tree: SpecTree) -> Iterator[tuple[str, ParamSpec]]:
    """Iterate over the names under which tensors are saved, in the order of ``state_dict``; of tied ones over one."""
    persistent = [path for path, kind, _ in named_tensors(model) if kind != "non_persistent_buffer"]
    pretrained = is_pretrained(model)
    dropped = set((model._keys_to_ignore_on_save or ()) if pretrained else ())  # noqa: SLF001  it has no other name
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
    """Return a pattern of the paths that differ from one only in their numbers.

    >>> family("model.layers.11.mlp.experts.3.w1.weight")
    'model.layers.*.mlp.experts.*.w1.weight'
    """
    return _NUMBER.sub("*", path)


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether a model is transformers'."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.partition(".")[0] == "transformers"
        for cls in type(model).__mro__
    )


@frozen
class _Group:
    """Keys that one tensor of the model is made of, or the first of several, by the pattern that matched them."""

    converter: Any
    keys: dict[str, list[str]]


def _grouped(model: Any, names: dict[str, bool], keys: Iterable[str]) -> tuple[dict[str, _Group], dict[str, str]]:
    """Return the keys that each name is made of, and those that nothing is."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if not isinstance(one, WeightRenaming)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    is_ignored = _any_of(_ignored(model))
    groups: dict[str, _Group] = {}
    extra: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
        converter = None if pattern is None else by_pattern[pattern]
        if name in names:
            group = groups.setdefault(name, _Group(converter, {}))
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


def _targets(converter: Any, name: str) -> list[str]:
    """Return the names of all that is made with what has a name."""
    targets = [] if converter is None else converter.target_patterns
    return [name.replace(targets[0], target) for target in targets] or [name]


def _ignored(model: Any) -> set[str]:
    """Return the patterns of names that transformers expects in old checkpoints, and leaves out."""
    buffers = [path for path, _ in model.named_buffers()]
    patterns: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001  it has no other name
    if any(path.endswith("rotary_emb.inv_freq") for path in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(path.endswith("position_ids") for path in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def _any_of(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    compiled = [re.compile(pattern) for pattern in patterns or ()]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def _made(
    converter: Any, stored: Mapping[str, list[Assembly]], name: str, model: Any, tree: SpecTree
) -> dict[str, Assembly]:
    if converter is None:
        (one,) = next(iter(stored.values()))
        return {name: one}
    return converted(converter, stored, name, lambda path: tree[path].orig_shape, model.config)


def _tie_patterns(model: Any) -> Iterator[str]:
    for path, module in model.named_modules():
        for pattern in getattr(module, "_tied_weights_keys", None) or ():
            yield f"{path}.{pattern}" if path else pattern


def _reverted(model: Any, tree: SpecTree, whole: Mapping[str, Assembly]) -> dict[str, Assembly]:
    """Return tensors in the form of the original checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, dot_natural_key, rename_source_key

    transforms: list[Any] | None = getattr(model, "_weight_conversions", None)
    if transforms is None:
        declared = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [one for one in declared if not isinstance(one, PrefixChange)]
        if not transforms:
            return dict(whole)
    reverse: list[Any] = [one.reverse_transform() for one in reversed(transforms)]
    renamings = [one for one in reverse if isinstance(one, WeightRenaming)]
    converters = [one for one in reverse if not isinstance(one, WeightRenaming)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
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
            made = _made(converter, stored, name, model, tree)
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
