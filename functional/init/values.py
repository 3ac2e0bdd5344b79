"""The value of each storage that init code computes with: the pointwise operations that made it, or why there are none."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ...specs.program import Box, Constant, InitProgram, Operation, Set
from ..model.read import storage_id
from .constant_tape import ConstantTape
from .constants import compute
from .operators import (
    NotPointwiseError,
    factory_operations,
    is_random,
    name_and_overload,
    needs_shape_only,
    operation_kind,
    pointwise_map,
)
from .strided_views import box_of, box_shape

_MAX_OPERATIONS = 64
_EXACT = frozenset([torch.float32, torch.float64])  # dtypes in which programs are computed


@frozen
class Value:
    """How the elements of a storage were made.

    Args:
        operations: The pointwise operations that made them; None if any other code did.
        cause: Why there are none.
        is_constant: Whether the tape computes them.
        of: Paths of the model's tensors whose values went in.
        draws: Numbers of the random operations that went in.
    """

    operations: tuple[Operation, ...] | None = None
    cause: str = ""
    is_constant: bool = False
    of: frozenset[str] = frozenset()
    draws: frozenset[int] = frozenset()


FROM_ELSEWHERE = Value(cause="it takes values of a tensor from elsewhere")


@define
class Values:
    """The values of all storages.

    Args:
        by_storage: The value of each storage.
        made_as: Shape and dtype with which each storage was made.
        tape: The operators that compute constants.
        num_draws: Number of random operations so far.
    """

    by_storage: dict[int, Value] = Factory(dict)
    made_as: dict[int, tuple[tuple[int, ...], torch.dtype]] = Factory(dict)
    tape: ConstantTape = Factory(ConstantTape)
    num_draws: int = 0

    def get(self, tensor: Tensor) -> Value:
        """Return the value of a tensor's storage."""
        return self.by_storage.get(storage_id(tensor), FROM_ELSEWHERE) if isinstance(tensor, FakeTensor) else FROM_ELSEWHERE

    def new_draw(self) -> frozenset[int]:
        """Return the number of a new random operation."""
        self.num_draws += 1
        return frozenset([self.num_draws])

    def of_result(self, func: Any, args: tuple[Any, ...], kwargs: Any, read: list[Tensor], result: Any) -> Value:
        """Return the value of an operator's result, for an operator that writes no tensor in place.

        Args:
            func: The operator.
            args: Its arguments.
            kwargs: Its keyword arguments.
            read: The tensors that it reads.
            result: Its result.
        """
        packet, _ = name_and_overload(func)
        inputs = [self.get(tensor) for tensor in read]
        drawn = [tensor for tensor, value in zip(read, inputs, strict=True) if not value.is_constant]
        is_lifted = packet in ("lift_fresh", "lift_fresh_copy")  # torch.tensor([1, 2])
        of, draws = union(value.of for value in inputs), union(value.draws for value in inputs)
        opaque = Value(of=of, draws=draws)
        if (not drawn or is_lifted) and not is_random(func):
            shape_only = needs_shape_only(func)
            opaque = Value(is_constant=self.tape.record(func, args, kwargs, result, shape_only=shape_only))
        elif is_random(func):
            opaque = evolve(opaque, draws=draws | self.new_draw())
        try:
            if not drawn:
                return evolve(opaque, operations=factory_operations(func, args, kwargs, result))
            if len(drawn) == 1 and drawn[0] is args[0]:
                return evolve(opaque, operations=self._continued(func, args, kwargs, result))
            cause = next((value.cause for value in inputs if value.cause), f"{packet} takes several tensors that are drawn")
            return evolve(opaque, cause=cause)
        except NotPointwiseError as error:
            return evolve(opaque, cause=str(error))

    def _continued(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> tuple[Operation, ...]:
        """Return the operations of the result of a pointwise operator on a drawn tensor."""
        before, packet = self.get(args[0]), name_and_overload(func)[0]
        if before.operations is None:
            raise NotPointwiseError(before.cause)
        is_alike = isinstance(result, Tensor) and is_in_order(args[0]) and result.shape == args[0].shape
        check(is_alike, f"{packet} is not pointwise")
        check(args[0].is_floating_point() and result.is_floating_point(), "it is drawn in another dtype")
        check(args[0].dtype == result.dtype or args[0].dtype in _EXACT, "it is rounded on the way")
        if packet in ("clone", "_to_copy"):
            return before.operations
        operation = pointwise_map(func, args, kwargs, lambda tensor: self._constant(tensor, args[0]))
        return (*before.operations, Operation(operation))

    def after_write(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, before: Value, path: str | None
    ) -> tuple[Operation, ...]:
        """Return the operations of a storage after an operator has written it, or a view of it, in place.

        Args:
            func: The operator.
            args: Its arguments; the first is the tensor that it writes.
            kwargs: Its keyword arguments.
            before: The value of the storage before.
            path: Path of the model's tensor that it is, None for a tensor on the side.
        """
        target = args[0]
        if before.operations is None and not _is_whole(target):
            raise NotPointwiseError(before.cause)
        check(len(before.operations or ()) < _MAX_OPERATIONS, f"its code is more than {_MAX_OPERATIONS} operations")
        if name_and_overload(func)[0] == "copy_" and not self.get(args[1]).is_constant:
            source = self.get(args[1])
            return self.copied(args[1], target, source.of if path is None else frozenset([path]))
        try:
            kind = operation_kind(func, args, kwargs, target, lambda tensor: self._constant(tensor, target))
        except NotPointwiseError as error:
            raise NotPointwiseError(before.cause or str(error)) from None
        box = self._box(target)
        operation = Operation(kind, box if any(box) else None)
        if before.operations is None and not operation.overwrites:
            raise NotPointwiseError(before.cause)
        return InitProgram(before.operations or ()).then(operation).operations

    def copied(self, source: Tensor, target: Tensor, allowed: frozenset[str]) -> tuple[Operation, ...]:
        """Return the operations of a tensor into which ``source`` is copied.

        Args:
            source: The tensor that is copied.
            target: The tensor that is written.
            allowed: The only tensors of the model whose values may have gone into ``source``.
        """
        value = self.get(source)
        if value.is_constant:
            return (Operation(Set(self._constant(source, target))),)
        if value.operations is None:
            raise NotPointwiseError(value.cause)
        check(not value.of - allowed, f"it is computed from {', '.join(sorted(value.of - allowed))}")
        is_whole = is_in_order(source) and is_in_order(target) and self.shape(source) == self.shape(target)
        check(is_whole, "a part of what is drawn is copied")
        check(source.is_floating_point() and target.is_floating_point(), "it is drawn in another dtype")
        check(source.dtype == target.dtype or source.dtype in _EXACT, "it is rounded on the way")
        return value.operations

    def constant_item(self, tensor: Tensor) -> bool | int | float | None:
        """Return the single value of a constant tensor, None if it is not constant or cannot be computed again."""
        if self.get(tensor).is_constant:
            try:
                with _disable_current_modes():
                    return compute(self.tape.constant(tensor)).item()
            except NotPointwiseError:
                pass
        return None

    def _constant(self, tensor: Tensor, target: Tensor) -> Constant:
        """Return a constant in the shape and order of the tensor that it goes into; a single element as it is."""
        if not self.get(tensor).is_constant:
            raise NotPointwiseError(self.get(tensor).cause or "another tensor that is drawn goes in")
        aten = torch.ops.aten
        if tensor.numel() > 1:
            wanted = box_shape(self.shape(target), self._box(target))
            order = sorted(range(target.dim()), key=lambda axis: -target.stride(axis))
            if tensor.shape != target.shape:
                tensor = self._computed(aten.expand.default, tensor, list(target.shape))
            if order != list(range(target.dim())):
                tensor = self._computed(aten.permute.default, tensor, order)
            if tuple(tensor.shape) != wanted:
                tensor = self._computed(aten.reshape.default, tensor, list(wanted))
        return self.tape.constant(tensor)

    def _computed(self, func: Any, *args: Any) -> Tensor:
        result = func(*args)
        if not self.tape.record(func, args, {}, result):
            raise NotPointwiseError(FROM_ELSEWHERE.cause)
        return result

    def _box(self, target: Tensor) -> Box:
        box = box_of(self.shape(target), int(target.storage_offset()), tuple(target.shape), target.stride())
        if box is None:
            msg = "its code writes a part of it that is no box"
            raise NotPointwiseError(msg)
        return box

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape with which the whole storage of a tensor was made."""
        shape, dtype = self.made_as.get(storage_id(tensor), ((), None))
        is_same = dtype == tensor.dtype and tensor.untyped_storage().nbytes() == prod(shape) * tensor.element_size()
        check(is_same, "its code looks at it in another shape or dtype")
        return shape


def is_in_order(tensor: Tensor) -> bool:
    """Tell whether a tensor is the whole of its storage, in memory order."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def check(condition: bool, cause: str) -> None:  # noqa: FBT001
    """Raise ``NotPointwiseError`` with a cause unless a condition holds."""
    if not condition:
        raise NotPointwiseError(cause)


def union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    """Return the union of sets."""
    return frozenset[Any]().union(*sets)
