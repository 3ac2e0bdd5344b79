"""What a rule says of a call, tried on numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardplan.functional.types.relation import (
    Filled,
    Joined,
    Label,
    Relation,
    RepeatedEach,
    Reshaped,
    Rule,
    Strided,
    Taken,
    Tiled,
    Widened,
)

from .operator_calls import Sample

Tensors = Sequence[torch.Tensor]


def check(sample: Sample, rule: Rule) -> int:
    """Assert that what a rule says of a call is so; return how many things it says were tried."""
    if not isinstance(rule, Relation):
        _check_moved(sample, rule)
        return 1
    sizes = label_sizes(sample, rule)
    num_tried = 0
    for label, size in sizes.items():
        if label not in rule.whole and size > 1:
            num_tried += sum(_check_label(sample, rule, label, size, some) for some in adding(rule, label))
    return num_tried + sum(_check_linear(sample, group) for group in rule.linear)


def label_sizes(sample: Sample, rule: Relation) -> dict[Label, int]:
    """Return how many entries axes with each label have; several axes with one label have as many, or one."""
    found: dict[Label, int] = {}
    assert len(rule.operands) == len(sample.operands)
    assert len(rule.results) == len(sample.results)
    repeated = dict(rule.repeated)
    for number, (tensors, labelled) in enumerate(((sample.operands, rule.operands), (sample.results, rule.results))):
        for at, (tensor, labels) in enumerate(zip(tensors, labelled, strict=True)):
            for axis, (size, label) in enumerate(zip(tensor.shape, labels, strict=True)):
                if not label:
                    assert number or size == 1, f"axis {axis} of operand {at} has {size} entries and no label"
                    continue
                how = repeated.get(at) if not number else None
                num = size * how.num if how is not None and how.axis == axis else size
                assert num == 1 or found.get(label, 1) in {1, num}, f"{label} has {found[label]} and {num} entries"
                found[label] = max(num, found.get(label, 1))
    return found


def adding(rule: Relation, label: Label) -> list[frozenset[int]]:
    """Return operands that must be summands where those with a label have parts, in each way that there is."""
    if label not in rule.summed | rule.averaged:
        return [frozenset()]
    having = {number for number, labels in enumerate(rule.operands) if label in labels}
    return [group - having for group in rule.linear if group & having] or [frozenset()]


def _check_label(sample: Sample, rule: Relation, label: Label, size: int, adding: frozenset[int]) -> bool:
    step = max([how.num for number, how in rule.repeated if label in rule.operands[number]], default=1)
    fewest = 2 if sample.name.startswith("squeeze") else 1  # an axis of which a part is one entry is gone
    cut = max(fewest, size // step // 3) * step
    if size - cut < fewest:
        return False
    parts = [_part(sample.operands, rule.operands, label, size, bounds, rule) for bounds in ((0, cut), (cut, size))]
    for number in adding:
        for part, summand in zip(parts, _summands(sample.operands[number]), strict=True):
            part[number] = summand
    made = [sample.run_on(part, **_local_sizes(sample, rule, label, part)) for part in parts]
    wholes = sample.results
    for at, (whole, labels) in enumerate(zip(wholes, rule.results, strict=True)):
        first, second = made[0][at], made[1][at]
        if label in rule.summed:
            assert label not in labels
            _assert_close(sample, first + second, whole, f"sums over parts of {label} do not add up")
        elif label in rule.averaged:
            assert label not in labels
            mean = (first * cut + second * (size - cut)) / size
            _assert_close(sample, mean, whole, f"means over parts of {label} do not add up")
        elif label in labels:
            axis = labels.index(label)
            assert labels.count(label) == 1
            _assert_close(
                sample, torch.cat([first, second], axis), whole, f"parts along {label} are not parts of the result"
            )
        else:
            for part in (first, second):
                _assert_close(sample, part, whole, f"result {at} depends on parts of {label}")
    return True


def _part(
    operands: Tensors,
    labelled: Sequence[Sequence[Label]],
    label: Label,
    size: int,
    bounds: tuple[int, int],
    rule: Relation,
) -> list[torch.Tensor]:
    repeated = dict(rule.repeated)
    made: list[torch.Tensor] = []
    for number, (operand, labels) in enumerate(zip(operands, labelled, strict=True)):
        part = operand
        for axis, name in enumerate(labels):
            if name == label and operand.shape[axis] > 1:
                num = repeated[number].num if number in repeated and repeated[number].axis == axis else 1
                part = part.narrow(axis, bounds[0] // num, (bounds[1] - bounds[0]) // num)
        made.append(part.contiguous())
    return made


_CONVOLUTIONS = "convolution _convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
_SIZES: Mapping[str, tuple[str, int]] = {
    "native_group_norm": ("N", 0),
    **dict.fromkeys(_CONVOLUTIONS.split(), ("groups", -1)),
}
"""Arguments that are sizes of the first operand: of its first axis, or of channels."""


def _local_sizes(sample: Sample, rule: Relation, label: Label, part: Tensors) -> dict[str, Any]:
    if sample.name not in _SIZES:
        return {}
    name, axis = _SIZES[sample.name]
    axis = axis if axis >= 0 else sample.operands[0].ndim + 1 - sample.operands[1].ndim
    is_split = rule.operands[0][axis] == label and sample.arguments[name] == sample.operands[0].shape[axis]
    return {name: part[0].shape[axis]} if is_split else {}


def _check_linear(sample: Sample, group: frozenset[int]) -> bool:
    operands = sample.operands
    assert all(number < len(operands) for number in group)
    members = [operands[number] for number in group]
    if not all((met.is_floating_point() or met.is_complex()) and met.isfinite().all() for met in members):
        return False
    summands = {number: _summands(operands[number]) for number in group}
    given = [[summands[n][which] if n in group else operand for n, operand in enumerate(operands)] for which in (0, 1)]
    made = [sample.run_on(some) for some in given]
    for first, second, whole in zip(*made, sample.results, strict=True):
        _assert_close(sample, first + second, whole, f"it is not linear in {sorted(group)}")
    return True


def _summands(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        first = torch.randint(-3, 4, tensor.shape, generator=generator).to(tensor.dtype)
    else:
        first = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return first, tensor - first


def _check_moved(sample: Sample, rule: Rule) -> None:
    for made, expected in zip(sample.results, _expected(sample, rule), strict=True):
        if expected is not None:
            _assert_close(sample, made, torch.as_tensor(np.array(expected)), f"it is not {rule}")


def _expected(sample: Sample, rule: Rule) -> Iterator[np.ndarray | None]:  # noqa: C901  a case for each rule
    """Iterate over what a rule says that the results are, in numpy's words; None for memory that nobody has written."""
    first = next((operand.resolve_conj().numpy() for operand in sample.operands), np.zeros(()))
    shapes = [tuple(result.shape) for result in sample.results]
    match rule:
        case Reshaped():
            yield from (first.reshape(shape) for shape in shapes)
        case Taken(axis, ranges):
            yield from (np.take(first, range(start, stop), axis) for start, stop in ranges)
        case Strided(axis, start, step):
            yield np.take(first, range(start, first.shape[axis], step), axis)
        case Joined(axis):
            given = [operand.numpy() for operand in sample.operands]
            rank = max(array.ndim for array in given)
            yield np.concatenate([array for array in given if array.ndim == rank], axis)
        case Widened():
            yield from (np.broadcast_to(first, shape) for shape in shapes)
        case Tiled(repeats):
            yield np.tile(first, repeats)
        case RepeatedEach(axis, num):
            yield np.repeat(first, num, axis)
        case Filled():
            for result in sample.results:
                yield None if "empty" in sample.name or not result.numel() else np.full(result.shape, result.flatten()[0])
        case Relation():
            raise AssertionError


def _assert_close(sample: Sample, made: torch.Tensor, expected: torch.Tensor, fault: str) -> None:
    assert made.shape == expected.shape, f"{sample.name}: {fault}: {list(made.shape)} against {list(expected.shape)}"
    if not sample.is_random:
        precision = _PRECISION.get(expected.dtype, 1e-4)
        close = torch.allclose(made.to(expected.dtype), expected, rtol=precision, atol=precision, equal_nan=True)
        assert close, f"{sample.name}: {fault}"


_PRECISION = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.complex32: 5e-3}
