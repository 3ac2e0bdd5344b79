"""What transformers declares is done to tensors between a checkpoint and a model, done to boxes instead. No torch.

transformers' core_model_loading.py has the operations. Each of them that only joins, cuts or turns tensors has its like
here, which gives the same result under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from .assembly import Assembly, concatenated, narrowed, squeezed, stacked, transposed

Collected = dict[str, list[Assembly]]
"""Tensors by the pattern of the declaration that matched their keys."""


@frozen
class Around:
    """What an operation may ask about besides its tensors.

    Args:
        name: Full name of the first tensor that it makes.
        sources: Patterns of what goes in.
        targets: Patterns of what comes out.
        shape_of: Shape of the model's tensor of a name; raises KeyError if there is none.
        config: The model's configuration.
    """

    name: str
    sources: list[str]
    targets: list[str]
    shape_of: Callable[[str], tuple[int, ...]]
    config: Any


def converted(
    converter: Any,
    collected: Mapping[str, Sequence[Assembly]],
    name: str,
    shape_of: Callable[[str], tuple[int, ...]],
    config: Any,
) -> dict[str, Assembly]:
    """Return what a declared conversion makes of tensors, by their full names.

    Args:
        converter: transformers' ``WeightConverter``.
        collected: The tensors by the source pattern that matched them, in natural order of their keys.
        name: Full name of what is made; of several the first.
        shape_of: Shape of the model's tensor of a name; raises KeyError if there is none.
        config: The model's configuration.

    Raises:
        ValueError: If an operation cannot be done to boxes, or not to these; the text names it.
    """
    around = Around(name, converter.source_patterns, converter.target_patterns, shape_of, config)
    tensors: Collected = {pattern: list(ones) for pattern, ones in collected.items()}
    for operation in converter.operations:
        apply = _OPERATIONS.get(type(operation).__name__)
        if apply is None or type(operation).__module__ != "transformers.core_model_loading":
            msg = f"{operation} of transformers' declaration cannot be done to boxes of stored tensors"
            raise ValueError(msg)
        try:
            tensors = apply(operation, tensors, around)
        except (ValueError, KeyError, AttributeError) as error:
            msg = f"{operation} of transformers' declaration cannot be done: {error}"
            raise ValueError(msg) from None
    full = name.replace("*.", "0.")
    pattern = next((pattern for pattern in tensors if pattern in full), None)
    before, _, after = full.partition(pattern) if pattern is not None else ("", "", "")
    return {f"{before}{pattern}{after}": _only(pattern, ones) for pattern, ones in tensors.items()}


def _concatenate(operation: Any, tensors: Collected, around: Around) -> Collected:
    target = operation.get_target_pattern(around.targets)
    ones = [one for pattern in around.sources for one in tensors.get(pattern, ())]
    if not ones:
        msg = "none of its tensors is there"
        raise ValueError(msg)
    return {target: [concatenated(ones, operation.dim)]}


def _chunk(operation: Any, tensors: Collected, around: Around) -> Collected:
    tensor = _single(tensors)
    targets = operation.get_target_patterns(around.targets, config=around.config)
    length = tensor.shape[operation.dim]
    size = max(1, -(-length // len(targets)))  # as torch.chunk has it
    starts = range(0, length, size)
    return {
        target: [narrowed(tensor, operation.dim, start, min(start + size, length))]
        for target, start in zip(targets, starts, strict=False)
    }


def _split(operation: Any, tensors: Collected, around: Around) -> Collected:
    tensor = _single(tensors)
    found: Collected = {}
    start = 0
    for target in around.targets:
        size = around.shape_of(around.name.replace(around.targets[0], target))[operation.dim]
        found[target] = [narrowed(tensor, operation.dim, start, start + size)]
        start += size
    if start != tensor.shape[operation.dim]:
        msg = f"its parts have {start} entries, and {tensor.shape[operation.dim]} are stored"
        raise ValueError(msg)
    return found


def _merge(operation: Any, tensors: Collected, around: Around) -> Collected:
    for pattern, ones in tensors.items():
        _check_numbers(pattern, ones)
    return {
        operation.get_target_pattern(len(tensors), pattern, around.targets): [stacked(ones, operation.dim)]
        for pattern, ones in tensors.items()
    }


def _unmerge(operation: Any, tensors: Collected, around: Around) -> Collected:
    found: Collected = {}
    for pattern, ones in tensors.items():
        tensor = _only(pattern, ones)
        size = tensor.shape[operation.dim]
        targets = operation.get_target_patterns(tensors, pattern, around.targets, size)
        for place, target in enumerate(targets):
            found[target] = [squeezed(narrowed(tensor, operation.dim, place, place + 1), operation.dim)]
    return found


def _transpose(operation: Any, tensors: Collected, around: Around) -> Collected:
    target = operation.get_target_pattern(tensors, around.sources, around.targets)
    tensor = _single(tensors)
    if operation.check_dims and tensor.shape == around.shape_of(around.name):
        return {target: [tensor]}
    return {target: [transposed(tensor, operation.dim0, operation.dim1)]}


def _check_numbers(pattern: str, ones: Sequence[Assembly]) -> None:
    """Raise ValueError unless the keys of a list are numbered from 0 on: places are counted, and one may be missing."""
    rows = [[int(name) for name in one.keys[0].split(".") if name.isdecimal()] for one in ones]
    counted = next((set(column) for column in zip(*rows, strict=False) if len(set(column)) > 1), {0})
    if lost := set(range(max(counted))) - counted:
        msg = f"of {pattern} number {', '.join(map(str, sorted(lost)))} is missing, and {max(counted)} is there"
        raise ValueError(msg)


def _single(tensors: Collected) -> Assembly:
    if len(tensors) > 1:
        msg = f"it takes one tensor, and there are {', '.join(tensors)}"
        raise ValueError(msg)
    return _only(*next(iter(tensors.items())))


def _only(pattern: str, ones: list[Assembly]) -> Assembly:
    if len(ones) > 1:
        msg = f"{pattern} is one tensor, and several keys give it: {', '.join(key for one in ones for key in one.keys)}"
        raise ValueError(msg)
    return ones[0]


_OPERATIONS: Mapping[str, Callable[[Any, Collected, Around], Collected]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "MergeModulelist": _merge,
    "Split": _split,
    "SplitModulelist": _unmerge,
    "Transpose": _transpose,
}
