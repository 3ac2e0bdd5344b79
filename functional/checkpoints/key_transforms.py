"""The tensor conversions that transformers declares between a checkpoint and a model, applied to boxes.

The operations are those of transformers' ``core_model_loading.py``. Each operation that only concatenates, cuts or
transposes tensors has a counterpart here, which gives the same result under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from .assembly import Assembly, concatenated, narrowed, squeezed, stacked, transposed

Collected = dict[str, list[Assembly]]
"""Tensors by the pattern, in the declaration, that matched their keys."""


@frozen
class Context:
    """The context of an operation, besides its tensors.

    Args:
        name: Full name of the first tensor that the conversion yields.
        sources: Patterns of the input keys.
        targets: Patterns of the output names.
        shape_of: Returns the shape of the model's tensor of a name; raises KeyError if there is none.
        config: The model's configuration.
    """

    name: str
    sources: list[str]
    targets: list[str]
    shape_of: Callable[[str], tuple[int, ...]]
    config: Any


def convert(
    converter: Any,
    collected: Mapping[str, Sequence[Assembly]],
    name: str,
    shape_of: Callable[[str], tuple[int, ...]],
    config: Any,
) -> dict[str, Assembly]:
    """Apply a declared conversion to tensors; return its results by their full names.

    Args:
        converter: transformers' ``WeightConverter``.
        collected: The tensors by the source pattern that matched them, in natural order of their keys.
        name: Full name of the (first) result.
        shape_of: Returns the shape of the model's tensor of a name; raises KeyError if there is none.
        config: The model's configuration.

    Raises:
        ValueError: If an operation cannot be done to boxes, or not to these tensors; the message names the operation.
    """
    context = Context(name, converter.source_patterns, converter.target_patterns, shape_of, config)
    tensors: Collected = {pattern: list(ones) for pattern, ones in collected.items()}
    for operation in converter.operations:
        apply = _OPERATIONS.get(type(operation).__name__)
        if apply is None or type(operation).__module__ != "transformers.core_model_loading":
            msg = f"{operation} of transformers' declaration cannot be done to boxes of stored tensors"
            raise ValueError(msg)
        try:
            tensors = apply(operation, tensors, context)
        except (ValueError, KeyError, AttributeError) as error:
            msg = f"{operation} of transformers' declaration cannot be done: {error}"
            raise ValueError(msg) from None
    full = name.replace("*.", "0.")
    pattern = next((pattern for pattern in tensors if pattern in full), None)
    before, _, after = full.partition(pattern) if pattern is not None else ("", "", "")
    return {f"{before}{pattern}{after}": _only(pattern, ones) for pattern, ones in tensors.items()}


def _concatenate(operation: Any, tensors: Collected, context: Context) -> Collected:
    target = operation.get_target_pattern(context.targets)
    ones = [one for pattern in context.sources for one in tensors.get(pattern, ())]
    if not ones:
        msg = "none of its tensors is there"
        raise ValueError(msg)
    return {target: [concatenated(ones, operation.dim)]}


def _chunk(operation: Any, tensors: Collected, context: Context) -> Collected:
    tensor = _single(tensors)
    targets = operation.get_target_patterns(context.targets, config=context.config)
    length = tensor.shape[operation.dim]
    size = max(1, -(-length // len(targets)))  # as torch.chunk has it
    starts = range(0, length, size)
    return {
        target: [narrowed(tensor, operation.dim, start, min(start + size, length))]
        for target, start in zip(targets, starts, strict=False)
    }


def _split(operation: Any, tensors: Collected, context: Context) -> Collected:
    tensor = _single(tensors)
    found: Collected = {}
    start = 0
    for target in context.targets:
        size = context.shape_of(context.name.replace(context.targets[0], target))[operation.dim]
        found[target] = [narrowed(tensor, operation.dim, start, start + size)]
        start += size
    if start != tensor.shape[operation.dim]:
        msg = f"its parts have {start} entries, and {tensor.shape[operation.dim]} are stored"
        raise ValueError(msg)
    return found


def _merge(operation: Any, tensors: Collected, context: Context) -> Collected:
    for pattern, ones in tensors.items():
        _check_numbers(pattern, ones)
    return {
        operation.get_target_pattern(len(tensors), pattern, context.targets): [stacked(ones, operation.dim)]
        for pattern, ones in tensors.items()
    }


def _unmerge(operation: Any, tensors: Collected, context: Context) -> Collected:
    found: Collected = {}
    for pattern, ones in tensors.items():
        tensor = _only(pattern, ones)
        size = tensor.shape[operation.dim]
        targets = operation.get_target_patterns(tensors, pattern, context.targets, size)
        for place, target in enumerate(targets):
            found[target] = [squeezed(narrowed(tensor, operation.dim, place, place + 1), operation.dim)]
    return found


def _transpose(operation: Any, tensors: Collected, context: Context) -> Collected:
    target = operation.get_target_pattern(tensors, context.sources, context.targets)
    tensor = _single(tensors)
    if operation.check_dims and tensor.shape == context.shape_of(context.name):
        return {target: [tensor]}
    return {target: [transposed(tensor, operation.dim0, operation.dim1)]}


def _check_numbers(pattern: str, ones: Sequence[Assembly]) -> None:
    """Raise ValueError if the numbers in the keys of a list have a gap, since tensors are stacked by place."""
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


_OPERATIONS: Mapping[str, Callable[[Any, Collected, Context], Collected]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "MergeModulelist": _merge,
    "Split": _split,
    "SplitModulelist": _unmerge,
    "Transpose": _transpose,
}
