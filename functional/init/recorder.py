"""Record how init code gives values to the model's tensors, while it runs on fake tensors.

Code that draws into a tensor on the side and copies it, or computes a constant there, is followed; code that mixes elements
is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve, frozen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...specs.program import Normal, Operation, TruncatedNormal, Uniform
from ..model.fake_values import DependsOnValuesError, Guesses, asks_for_value
from ..model.read import storage_id
from ..model.rng_state import Reseeding
from .operators import (
    NotPointwiseError,
    arguments,
    is_random,
    is_view,
    name_and_overload,
    needs_shape_only,
    overwrites,
    truncated_normal_of_torch,
)
from .strided_views import View, whole_view
from .values import Value, Values, check, is_in_order, union


@frozen
class Touch:
    """How a piece of init code uses one tensor of the model.

    Args:
        writes: Whether it writes the tensor.
        overwritten: Views of the tensor that it writes without reading: offset, shape and stride, in elements.
        operations: The pointwise operations by which it writes the tensor; None if it writes it in any other way.
        cause: Why there are none.
        of: Paths of the model's other tensors whose values go in.
    """

    writes: bool = False
    overwritten: frozenset[View] = frozenset()
    operations: tuple[Operation, ...] | None = ()
    cause: str = ""
    of: frozenset[str] = frozenset()


class Recorder(TorchDispatchMode):
    """Record how the operators within the block use the model's tensors; ``touched`` returns the record.

    A question for a single value (``tensor.item()``, ``if tensor.any()``) is answered with the value of a constant. For a
    drawn tensor it is answered with zero, and code that asks it is not pointwise, except ``torch.nn.init.trunc_normal_``.

    Args:
        paths: Paths of the model's tensors, by the identity of their storage.
        shapes: Their shapes, by path.
    """

    def __init__(self, paths: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._paths = dict(paths)
        self._shapes = shapes
        self._values = Values()
        self._overwritten: dict[str, set[View]] = {}
        self._storage_of: dict[str, int] = {}  # the storage of each of the model's tensors that was met, now
        self._alive: list[object] = []  # storages, so that their identities are not reused
        self._guesses = Guesses()
        self._asked_of: frozenset[str] = frozenset()
        self._reseeding = Reseeding()

    @property
    def has_guessed(self) -> bool:
        """Whether the code has asked for a value that is not known."""
        return self._guesses.num > 0

    def touched(self) -> dict[str, Touch]:
        """Return how each tensor of the model that was read or written was used."""
        values = {path: self._values.by_storage[storage] for path, storage in self._storage_of.items()}
        users: dict[int, list[str]] = {}
        for path, value in values.items():
            for draw in value.draws:
                users.setdefault(draw, []).append(path)
        touched: dict[str, Touch] = {}
        for path, value in values.items():
            sharing = {user for draw in value.draws for user in users[draw]} - {path}
            operations, cause = value.operations, value.cause
            of = (value.of | sharing) - {path}
            if path in self._overwritten and self.has_guessed:
                operations, cause = None, "its code looks at values that are drawn"
                of |= self._asked_of - {path}
            elif path in self._overwritten and self._reseeding.seen:
                operations, cause = None, "its code seeds the generator itself"
            elif sharing:
                operations, cause = None, f"it shares its random numbers with {', '.join(sorted(sharing))}"
            views = frozenset(self._overwritten.get(path, ()))
            touched[path] = Touch(path in self._overwritten, views, operations, cause, of)
        return touched

    def assign(self, path: str, tensor: Tensor) -> None:
        """Record that the code has replaced a tensor of the model: ``weight.data = tensor``."""
        storage, value = storage_id(tensor), self._values.get(tensor)
        self._alive.append(tensor.untyped_storage())
        self._storage_of[path] = storage
        views = self._overwritten.setdefault(path, set())
        if path not in value.of:
            views.add(whole_view(self._shapes[path]))
        self._values.made_as.setdefault(storage, (tuple(tensor.shape), tensor.dtype))
        after = evolve(value, is_constant=False, of=value.of | {path})
        try:
            is_whole = is_in_order(tensor) and self._values.shape(tensor) == self._shapes[path]
            check(is_whole, "a view of a tensor stands for it")
            operations = self._values.copied(tensor, tensor, frozenset([path]))
            self._values.by_storage[storage] = evolve(after, operations=operations)
        except NotPointwiseError as error:
            self._values.by_storage[storage] = evolve(after, operations=None, cause=str(error))
        self._paths.setdefault(storage, path)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if asks_for_value(func):
            return self._answer(args[0])
        changed, read = arguments(func, args, kwargs)
        if any(not isinstance(tensor, FakeTensor) for tensor in changed) or name_and_overload(func)[0] in (
            "set_",
            "resize_",
        ):
            msg = "the code changes a tensor from elsewhere, or what a tensor is made of"
            raise DependsOnValuesError(msg)
        for tensor in (*changed, *read):
            self._meet(tensor)
        if is_random(func):
            self._reseeding.draw()
        result = func(*args, **kwargs)
        self._alive += [out.untyped_storage() for out in tree_leaves(result) if isinstance(out, Tensor)]
        if changed:
            self._record_write(func, args, kwargs, changed, read, result)
        elif not is_view(func) or not isinstance(args[0], FakeTensor):
            self._record_result(func, args, kwargs, read, result)
        elif self._values.get(args[0]).is_constant and not self._values.tape.record(func, args, kwargs, result):
            cause = f"{name_and_overload(func)[0]} cannot be computed again"
            self._values.by_storage[storage_id(args[0])] = Value(cause=cause)
        return result

    def _meet(self, tensor: Tensor) -> None:
        """Begin the value of a tensor of the model at its first use."""
        path = self._paths.get(storage_id(tensor)) if isinstance(tensor, FakeTensor) else None
        if path is not None and path not in self._storage_of:
            storage = storage_id(tensor)
            self._storage_of[path] = storage
            self._values.by_storage[storage] = Value((), of=frozenset([path]))
            self._values.made_as[storage] = self._shapes[path], tensor.dtype

    def _record_result(self, func: Any, args: tuple[Any, ...], kwargs: Any, read: list[Tensor], result: Any) -> None:
        """Record an operator that returns new tensors."""
        if needs_shape_only(func):
            read = [tensor for tensor in read if tensor is not args[0]]
        value = self._values.of_result(func, args, kwargs, read, result)
        for out in (out for out in tree_leaves(result) if isinstance(out, Tensor)):
            self._values.made_as[storage_id(out)] = tuple(out.shape), out.dtype
            if value.operations is not None and not is_in_order(out):
                value = evolve(value, operations=None, cause="it is transposed")
            self._values.by_storage[storage_id(out)] = value

    def _record_write(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, changed: list[Tensor], read: list[Tensor], result: Any
    ) -> None:
        """Record an operator that writes tensors in place."""
        inputs = [self._values.get(tensor) for tensor in read]
        before = {storage_id(tensor): self._values.get(tensor) for tensor in changed}
        is_constant = not is_random(func) and all(value.is_constant for value in (*inputs, *before.values()))
        is_constant = is_constant and self._values.tape.record(func, args, kwargs, result, frozenset(before))
        for target in (tensor for tensor in changed if tensor.numel()):
            storage = storage_id(target)
            path = self._paths.get(storage)
            value = before[storage]
            value = Value(
                is_constant=is_constant and path is None,
                of=value.of | union(value.of for value in inputs),
                draws=value.draws | union(value.draws for value in inputs),
            )
            if value.is_constant:
                self._values.by_storage[storage] = evolve(value, cause="a constant is changed in part")
                continue
            if is_random(func) and path is None:
                value = evolve(value, draws=value.draws | self._values.new_draw())
            if path is not None:
                views = self._overwritten.setdefault(path, set())
                if overwrites(func) and not any(path in source.of for source in inputs):
                    views.add((int(target.storage_offset()), tuple(target.shape), target.stride()))
            try:
                is_alone = len(changed) == 1 and target is args[0]
                check(is_alone, f"{name_and_overload(func)[0].strip('_')} is not pointwise")
                operations = self._values.after_write(func, args, kwargs, before[storage], path)
                value = evolve(value, operations=operations)
            except NotPointwiseError as error:
                value = evolve(value, cause=str(error))
            self._values.by_storage[storage] = value

    def _answer(self, asked: Tensor) -> bool | int | float:
        """Answer code that asks for the single value of a tensor."""
        self._meet(asked)
        item = self._values.constant_item(asked)
        if item is not None:
            return item
        if (truncated := truncated_normal_of_torch()) and self._truncate_last_draw(*truncated):
            return False  # no element is outside of the interval
        self._asked_of |= self._values.get(asked).of
        return self._guesses.answer(asked)

    def _truncate_last_draw(self, target: Tensor, truncated: TruncatedNormal) -> bool:
        """Replace the last normal or uniform draw of a tensor by a truncated normal; return False if it has none."""
        value = self._values.get(target)
        if not value.operations or not isinstance(value.operations[-1].what, (Normal, Uniform)):
            return False
        *before, drawn = value.operations
        operations = (*before, evolve(drawn, what=truncated))
        self._values.by_storage[storage_id(target)] = evolve(value, operations=operations)
        return True
