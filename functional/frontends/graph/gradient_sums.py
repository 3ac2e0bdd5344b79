"""Gradients of which each rank has a part, as whole activations are spread over parts: where to add them up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from .factors import size_of

if TYPE_CHECKING:
    from .propagate import GraphOperation, GraphTensor, ModelAxes

_SPLITS = ("split", "split_with_sizes", "chunk")
_ALL = (0, 0)

Features = tuple[int, int]
"""First feature of the last axis, and the one after the last; twice 0 for all."""


@frozen
class GradientSums:
    """The gradients that are to be added up over ranks.

    Args:
        parameters: Parameters that are whole and work on parts.
        outputs: Linear modules, and the features of their outputs of whose gradient each rank has a part.
    """

    parameters: tuple[str, ...]
    outputs: tuple[tuple[str, Features], ...]


@frozen
class _Use:
    """A use of a whole tensor.

    Args:
        is_partial: Whether each rank has a part of the gradient that comes from it.
        features: The features that it takes.
    """

    is_partial: bool
    features: Features = _ALL


def gradient_sums(found: ModelAxes, meetings: Iterable[tuple[GraphOperation, GraphTensor]]) -> GradientSums | str:
    """Return where gradients are to be added up, or why they cannot be.

    The backward pass is linear: instead of where a whole tensor meets parts, the sum may be taken further up, at the output
    of a linear module, if all that is made of this output has partial gradients, or all that is made of a slice of it.

    Args:
        found: The model.
        meetings: Operations in which whole trained tensors meet parts, or are spread over them, and these tensors.
    """
    meeting = {(id(op), id(tensor)) for op, tensor in meetings}
    uses: defaultdict[int, list[_Use]] = defaultdict(list)
    for tensor in found.returned:
        uses[id(tensor)].append(_Use(is_partial=False))
    outputs: dict[tuple[str, Features], None] = {}
    for op in reversed(found.operations):
        of_outputs = [uses[id(tensor)] for tensor in op.outputs]
        if op.weight:
            partial = _partial_features(of_outputs[0])
            outputs |= {(op.module, features): None for features in partial or ()}
            above: list[_Use] | None = None if partial is None else [_Use(is_partial=False)]
        else:
            above = _uses_above(op, of_outputs)
        if above is None:
            return f"in {op.module or 'the model'} a whole activation meets parts, and is used whole too"
        for tensor in (tensor for tensor in op.inputs if tensor.is_trained):
            uses[id(tensor)] += [_Use(is_partial=True)] if (id(op), id(tensor)) in meeting else above
    parameters: dict[str, None] = {}
    for path, tensor in found.tensors.items():
        match _state(uses[id(tensor)]):
            case "partial":
                parameters[path] = None
            case "both":
                return f"{path} works on parts, and on whole activations too"
            case _:
                pass
    return GradientSums(tuple(parameters), tuple(outputs))


def _state(uses: Sequence[_Use]) -> Literal["partial", "whole", "both"]:
    partial = {use.is_partial for use in uses}
    return "both" if len(partial) > 1 else "partial" if True in partial else "whole"


def _partial_features(uses: Sequence[_Use]) -> list[Features] | None:
    """Return the features of an output that have partial gradients; None if some have whole gradients too."""
    if _state(uses) != "both":
        return [_ALL] if _state(uses) == "partial" else []
    slices = sorted({(use.features, use.is_partial) for use in uses})
    apart = all(before[1] <= after[0] for (before, _), (after, _) in pairwise(slices))
    return [features for features, is_partial in slices if is_partial] if apart and slices[0][0] != _ALL else None


def _uses_above(op: GraphOperation, of_outputs: Sequence[Sequence[_Use]]) -> list[_Use] | None:
    """Return the uses that an operation makes of its inputs, by those of its outputs; None if these are of both kinds."""
    states = {_state(uses) for uses in of_outputs if uses}
    if "both" in states:
        return None
    if slices := _slices(op):
        return [_Use(_state(uses) == "partial", slice_) for uses, slice_ in zip(of_outputs, slices, strict=True) if uses]
    return None if len(states) > 1 else [_Use(is_partial=states == {"partial"})]


def _slices(op: GraphOperation) -> list[Features]:
    """Return the features that each output takes of an input; none if it takes them all, or something else."""
    if op.name not in (*_SPLITS, "slice") or not op.inputs[0].axes:
        return []
    before, *after = (tuple(map(size_of, tensor.axes)) for tensor in (op.inputs[0], *op.outputs))
    first = op.node.args[2] if op.name == "slice" and len(op.node.args) > 2 else 0  # noqa: PLR2004  input, dim, start
    if any(shape[:-1] != before[:-1] for shape in after) or not isinstance(first, int):
        return []
    bounds = list(accumulate((shape[-1] for shape in after), initial=first % before[-1]))
    return list(pairwise(bounds)) if bounds[-1] <= before[-1] and (0, before[-1]) not in pairwise(bounds) else []
