"""What a piece of code does to known tensors, learnt by running it on fake ones.

Every storage has a value: the pointwise operations that made it, or the reason why there are none. Code that draws into a
tensor on the side and copies it, or computes a constant there, is followed; what mixes elements is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...specs.program import Box, Constant, InitProgram, Normal, Operation, Set, TruncatedNormal, Uniform
from ..model.fake_values import DependsOnValuesError, Guesses, asks_for_value
from ..model.rng_state import Rewinds
from .constant_tape import Tape
from .constants import compute
from .coverage import View, whole_view
from .operators import (
    NotPointwiseError,
    arguments,
    is_random,
    is_view,
    made,
    mapped,
    needs_shape_only,
    operator_name,
    overwrites,
    written,
)
from .strided_views import box_of, box_shape
from .truncated_normal import truncated_by_torch

_MAX_OPERATIONS = 64
_EXACT = frozenset([torch.float32, torch.float64])  # what programs are computed in


@frozen
class Touch:
    """What was done to one tensor.

    Args:
        writes: Whether it was written at all.
        overwritten: Views of it that were written without looking: offset, shape and stride, in elements.
        operations: The pointwise operations that wrote it, after what it was before; None if something else did.
        cause: Why there are none.
        of: Other known tensors whose values went in.
    """

    writes: bool = False
    overwritten: frozenset[View] = frozenset()
    operations: tuple[Operation, ...] | None = ()
    cause: str = ""
    of: frozenset[str] = frozenset()


@frozen
class _Value:
    """What is known of the elements of a storage.

    Args:
        operations: The pointwise operations that made them; None if something else did.
        cause: Why there are none.
        is_constant: Whether the tape makes it.
        of: Known tensors whose values went in.
        draws: Random operations on the side that went in, by number.
    """

    operations: tuple[Operation, ...] | None = None
    cause: str = ""
    is_constant: bool = False
    of: frozenset[str] = frozenset()
    draws: frozenset[int] = frozenset()


_ELSEWHERE = _Value(cause="it takes values of a tensor from elsewhere")


class Recorder(TorchDispatchMode):
    """Notes what the operations within the block do to known tensors; ``touched`` then tells.

    A question for one value (``tensor.item()``, ``if tensor.any()``) is answered truly for a constant. For what is drawn it
    is answered with zero, and the code that asks is not pointwise; but ``torch.nn.init.trunc_normal_`` is taken at its word.

    Args:
        storages: Names of the known tensors, by the identity of their storage.
        shapes: Their shapes, by name.
    """

    def __init__(self, storages: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._storages = dict(storages)
        self._known_shapes = shapes
        self._wholes: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self._values: dict[int, _Value] = {}
        self._overwritten: dict[str, set[View]] = {}
        self._standing: dict[str, int] = {}  # the storage that stands for a known tensor now
        self._tape = Tape()
        self._alive: list[object] = []  # storages, so that the identity of none is used again
        self._num_draws = 0
        self._guesses = Guesses()
        self._looked_at: frozenset[str] = frozenset()
        self._rewinds = Rewinds()

    @property
    def has_guessed(self) -> bool:
        """Whether the code has asked for a value that nobody knows."""
        return self._guesses.num > 0

    def touched(self) -> dict[str, Touch]:
        """Return what was done to each known tensor that was read or written."""
        values = {path: self._values[storage] for path, storage in self._standing.items()}
        users: dict[int, list[str]] = {}
        for path, value in values.items():
            for draw in value.draws:
                users.setdefault(draw, []).append(path)
        touched: dict[str, Touch] = {}
        for path, value in values.items():
            sharing = {other for draw in value.draws for other in users[draw]} - {path}
            operations, cause = value.operations, value.cause
            of = (value.of | sharing) - {path}
            if path in self._overwritten and self.has_guessed:
                operations, cause = None, "its code looks at values that are drawn"
                of |= self._looked_at - {path}
            elif path in self._overwritten and self._rewinds.seen:
                operations, cause = None, "its code seeds the generator itself"
            elif sharing:
                operations, cause = None, f"it shares its random numbers with {', '.join(sorted(sharing))}"
            views = frozenset(self._overwritten.get(path, ()))
            touched[path] = Touch(path in self._overwritten, views, operations, cause, of)
        return touched

    def assign(self, path: str, tensor: Tensor) -> None:
        """Note that another tensor stands for a known one now: ``weight.data = tensor``."""
        storage, value = _storage(tensor), self._get(tensor)
        self._alive.append(tensor.untyped_storage())
        self._standing[path] = storage
        views = self._overwritten.setdefault(path, set())
        if path not in value.of:
            views.add(whole_view(self._known_shapes[path]))
        self._wholes.setdefault(storage, (tuple(tensor.shape), tensor.dtype))
        after = evolve(value, is_constant=False, of=value.of | {path})
        try:
            is_whole = self._is_in_order(tensor) and self._shape(tensor) == self._known_shapes[path]
            _check(is_whole, "a view of a tensor stands for it")
            operations = self._copied(tensor, tensor, frozenset([path]))
            self._values[storage] = evolve(after, operations=operations)
        except NotPointwiseError as error:
            self._values[storage] = evolve(after, operations=None, cause=str(error))
        self._storages.setdefault(storage, path)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if asks_for_value(func):
            return self._one_value(args[0])
        changed, read = arguments(func, args, kwargs)
        if any(not isinstance(tensor, FakeTensor) for tensor in changed) or operator_name(func)[0] in ("set_", "resize_"):
            msg = "the code changes a tensor from elsewhere, or what a tensor is made of"
            raise DependsOnValuesError(msg)
        for tensor in (*changed, *read):
            self._meet(tensor)
        if is_random(func):
            self._rewinds.draw()
        result = func(*args, **kwargs)
        self._alive += [out.untyped_storage() for out in tree_leaves(result) if isinstance(out, Tensor)]
        if changed:
            self._write(func, args, kwargs, changed, read, result)
        elif not is_view(func) or not isinstance(args[0], FakeTensor):
            self._make(func, args, kwargs, read, result)
        elif self._get(args[0]).is_constant and not self._tape.record(func, args, kwargs, result):
            self._values[_storage(args[0])] = _Value(cause=f"{operator_name(func)[0]} cannot be computed again")
        return result

    def _make(self, func: Any, args: tuple[Any, ...], kwargs: Any, read: list[Tensor], result: Any) -> None:
        """Note an operator that gives new tensors."""
        if needs_shape_only(func):
            read = [tensor for tensor in read if tensor is not args[0]]
        value = self._made(func, args, kwargs, read, result)
        for out in (out for out in tree_leaves(result) if isinstance(out, Tensor)):
            self._wholes[_storage(out)] = tuple(out.shape), out.dtype
            if value.operations is not None and not self._is_in_order(out):
                value = evolve(value, operations=None, cause="it is transposed")
            self._values[_storage(out)] = value

    def _meet(self, tensor: Tensor) -> None:
        path = self._storages.get(_storage(tensor)) if isinstance(tensor, FakeTensor) else None
        if path is not None and path not in self._standing:
            self._standing[path] = _storage(tensor)
            self._values[_storage(tensor)] = _Value((), of=frozenset([path]))
            self._wholes[_storage(tensor)] = self._known_shapes[path], tensor.dtype

    def _get(self, tensor: Tensor) -> _Value:
        return self._values.get(_storage(tensor), _ELSEWHERE) if isinstance(tensor, FakeTensor) else _ELSEWHERE

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: Any, read: list[Tensor], result: Any) -> _Value:
        """Return the value of what an operator gives that writes nothing."""
        packet, _ = operator_name(func)
        inputs = [self._get(tensor) for tensor in read]
        drawn = [tensor for tensor, value in zip(read, inputs, strict=True) if not value.is_constant]
        is_lifted = packet in ("lift_fresh", "lift_fresh_copy")  # torch.tensor([1, 2])
        of, draws = _union(value.of for value in inputs), _union(value.draws for value in inputs)
        other = _Value(of=of, draws=draws)
        if (not drawn or is_lifted) and not is_random(func):
            shape_only = needs_shape_only(func)
            other = _Value(is_constant=self._tape.record(func, args, kwargs, result, shape_only=shape_only))
        elif is_random(func):
            other = evolve(other, draws=draws | self._new_draw())
        try:
            if not drawn:
                return evolve(other, operations=made(func, args, kwargs, result))
            if len(drawn) == 1 and drawn[0] is args[0]:
                return evolve(other, operations=self._continued(func, args, kwargs, result))
            cause = next((value.cause for value in inputs if value.cause), f"{packet} takes several tensors that are drawn")
            return evolve(other, cause=cause)
        except NotPointwiseError as error:
            return evolve(other, cause=str(error))

    def _continued(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> tuple[Operation, ...]:
        """Return the operations of a tensor that an operator makes of one that is drawn."""
        before, packet = self._get(args[0]), operator_name(func)[0]
        if before.operations is None:
            raise NotPointwiseError(before.cause)
        is_alike = isinstance(result, Tensor) and self._is_in_order(args[0]) and result.shape == args[0].shape
        _check(is_alike, f"{packet} is not pointwise")
        _check(args[0].is_floating_point() and result.is_floating_point(), "it is drawn in another dtype")
        _check(args[0].dtype == result.dtype or args[0].dtype in _EXACT, "it is rounded on the way")
        if packet in ("clone", "_to_copy"):
            return before.operations
        return (*before.operations, Operation(mapped(func, args, kwargs, lambda tensor: self._constant(tensor, args[0]))))

    def _write(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, changed: list[Tensor], read: list[Tensor], result: Any
    ) -> None:
        """Note an operator that writes tensors in place."""
        inputs = [self._get(tensor) for tensor in read]
        before = {_storage(tensor): self._get(tensor) for tensor in changed}
        is_constant = not is_random(func) and all(value.is_constant for value in (*inputs, *before.values()))
        is_constant = is_constant and self._tape.record(func, args, kwargs, result, frozenset(before))
        for target in (tensor for tensor in changed if tensor.numel()):
            storage = _storage(target)
            path = self._storages.get(storage)
            value = before[storage]
            value = _Value(
                is_constant=is_constant and path is None,
                of=value.of | _union(value.of for value in inputs),
                draws=value.draws | _union(value.draws for value in inputs),
            )
            if value.is_constant:
                self._values[storage] = evolve(value, cause="a constant is changed in part")
                continue
            if is_random(func) and path is None:
                value = evolve(value, draws=value.draws | self._new_draw())
            if path is not None:
                views = self._overwritten.setdefault(path, set())
                if overwrites(func) and not any(path in other.of for other in inputs):
                    views.add((int(target.storage_offset()), tuple(target.shape), target.stride()))
            try:
                is_alone = len(changed) == 1 and target is args[0]
                _check(is_alone, f"{operator_name(func)[0].strip('_')} is not pointwise")
                operations = self._after(func, args, kwargs, before[storage], path)
                value = evolve(value, operations=operations)
            except NotPointwiseError as error:
                value = evolve(value, cause=str(error))
            self._values[storage] = value

    def _after(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, before: _Value, path: str | None
    ) -> tuple[Operation, ...]:
        """Return the operations of a tensor after an operator has written it, or a view of it."""
        target = args[0]
        if before.operations is None and not self._is_whole(target):
            raise NotPointwiseError(before.cause)
        _check(len(before.operations or ()) < _MAX_OPERATIONS, f"its code is more than {_MAX_OPERATIONS} operations")
        if operator_name(func)[0] == "copy_" and not self._get(args[1]).is_constant:
            source = self._get(args[1])
            return self._copied(args[1], target, source.of if path is None else frozenset([path]))
        try:
            what = written(func, args, kwargs, target, lambda tensor: self._constant(tensor, target))
        except NotPointwiseError as error:
            raise NotPointwiseError(before.cause or str(error)) from None
        box = self._box(target)
        operation = Operation(what, box if any(box) else None)
        if before.operations is None and not operation.overwrites:
            raise NotPointwiseError(before.cause)
        return InitProgram(before.operations or ()).then(operation).operations

    def _copied(self, source: Tensor, target: Tensor, allowed: frozenset[str]) -> tuple[Operation, ...]:
        """Return the operations of a tensor that is a copy of another one, which may be made of ``allowed`` alone."""
        value = self._get(source)
        if value.is_constant:
            return (Operation(Set(self._constant(source, target))),)
        if value.operations is None:
            raise NotPointwiseError(value.cause)
        _check(not value.of - allowed, f"it is computed from {', '.join(sorted(value.of - allowed))}")
        is_whole = self._is_in_order(source) and self._is_in_order(target) and self._shape(source) == self._shape(target)
        _check(is_whole, "a part of what is drawn is copied")
        _check(source.is_floating_point() and target.is_floating_point(), "it is drawn in another dtype")
        _check(source.dtype == target.dtype or source.dtype in _EXACT, "it is rounded on the way")
        return value.operations

    def _constant(self, tensor: Tensor, target: Tensor) -> Constant:
        """Return a constant in the shape and order of what it is written to; one element alone as it is."""
        if not self._get(tensor).is_constant:
            raise NotPointwiseError(self._get(tensor).cause or "another tensor that is drawn goes in")
        aten = torch.ops.aten
        if tensor.numel() > 1:
            wanted = box_shape(self._shape(target), self._box(target))
            order = sorted(range(target.dim()), key=lambda axis: -target.stride(axis))
            if tensor.shape != target.shape:
                tensor = self._computed(aten.expand.default, tensor, list(target.shape))
            if order != list(range(target.dim())):
                tensor = self._computed(aten.permute.default, tensor, order)
            if tuple(tensor.shape) != wanted:
                tensor = self._computed(aten.reshape.default, tensor, list(wanted))
        return self._tape.constant(tensor)

    def _computed(self, func: Any, *args: Any) -> Tensor:
        result = func(*args)
        if not self._tape.record(func, args, {}, result):
            raise NotPointwiseError(_ELSEWHERE.cause)
        return result

    def _box(self, target: Tensor) -> Box:
        box = box_of(self._shape(target), int(target.storage_offset()), tuple(target.shape), target.stride())
        if box is None:
            msg = "its code writes a part of it that is no box"
            raise NotPointwiseError(msg)
        return box

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape that the whole of a storage was made with."""
        shape, dtype = self._wholes.get(_storage(tensor), ((), None))
        is_same = dtype == tensor.dtype and tensor.untyped_storage().nbytes() == prod(shape) * tensor.element_size()
        _check(is_same, "its code looks at it in another shape or dtype")
        return shape

    def _is_whole(self, tensor: Tensor) -> bool:
        return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()

    def _is_in_order(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is all of its storage, in the order in which it lies there."""
        return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes

    def _new_draw(self) -> frozenset[int]:
        self._num_draws += 1
        return frozenset([self._num_draws])

    def _one_value(self, asked: Tensor) -> bool | int | float:
        self._meet(asked)
        value = self._get(asked)
        if value.is_constant:
            try:
                with _disable_current_modes():
                    return compute(self._tape.constant(asked)).item()
            except NotPointwiseError:
                pass
        if (truncated := truncated_by_torch()) and self._drawn_again(*truncated):
            return False  # nothing is outside
        self._looked_at |= value.of
        return self._guesses.answer(asked)

    def _drawn_again(self, target: Tensor, truncated: TruncatedNormal) -> bool:
        """Take what was drawn last for what redrawing makes of it; return False if that was nothing of the kind."""
        value = self._get(target)
        if not value.operations or not isinstance(value.operations[-1].what, (Normal, Uniform)):
            return False
        *before, drawn = value.operations
        self._values[_storage(target)] = evolve(value, operations=(*before, evolve(drawn, what=truncated)))
        return True


def _check(condition: bool, cause: str) -> None:  # noqa: FBT001
    if not condition:
        raise NotPointwiseError(cause)


def _union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    return frozenset[Any]().union(*sets)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  torch says it nowhere else
