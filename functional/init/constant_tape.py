"""Record the operators that compute constant tensors in init code, so that every rank can compute them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...specs.dtypes import human_bytes
from ...specs.json_values import to_argument, to_plain
from ...specs.program import Constant, Node
from ..model.read import storage_id, view_id
from .constants import compute
from .operators import NotPointwiseError, name_and_overload

MAX_CONSTANT_BYTES = 32 * 2**20
"""Most bytes that computing a constant may take; each rank computes it by itself."""

_MAX_NODES = 256
_MAX_STORED = 1024  # elements of a constant whose values the plan holds
_MAX_LITERAL = 4096  # elements of a tensor literal in the code
_PLACEMENT = frozenset({"device", "layout", "pin_memory", "generator"})

View = tuple[object, ...]
"""Identity of a tensor's storage, with offset, shape, stride and dtype. Code may exchange it: ``x.data = y``."""


def _view(tensor: Tensor) -> View:
    return *view_id(tensor), tensor.dtype


@frozen
class _Entry:
    """A recorded operator.

    Args:
        number: Its place on the tape.
        node: The operator as the plan writes it.
        needs: Numbers of the entries whose results are its arguments.
        inputs: Storages that it reads.
        writes: Storages that it writes in place.
        num_bytes: Bytes of the storages that it makes.
    """

    number: int
    node: Node
    needs: frozenset[int]
    inputs: frozenset[int]
    writes: frozenset[int]
    num_bytes: int


@define
class ConstantTape:
    """The operators recorded so far.

    Args:
        entries: The operators, in order.
        results: For each tensor the entry that returned it, and the item of its result, None if that is a single tensor.
        alive: Storages, kept so that their identities are not reused.
    """

    entries: list[_Entry] = Factory(list)
    results: dict[View, tuple[int, int | None]] = Factory(dict)
    alive: list[object] = Factory(list)

    def record(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        writes: frozenset[int] = frozenset(),
        *,
        shape_only: bool = False,
    ) -> bool:
        """Record an operator; return False if it cannot be computed again.

        Args:
            func: The operator.
            args: Its arguments; tensors among them are results of earlier entries, or small literals in the code.
            kwargs: Its keyword arguments.
            result: Its result.
            writes: Storages that it wrote in place.
            shape_only: Whether it uses only the shape and dtype of its first argument.
        """
        schema = func._schema  # noqa: SLF001  torch has no public name for it
        if not schema.name.startswith("aten::") or not all(isinstance(out, Tensor) for out in tree_leaves(result)):
            return False
        outputs: list[Tensor] = tree_leaves(result)
        given = {name: value for name, value in kwargs.items() if name not in _PLACEMENT}
        inputs = [leaf for leaf in tree_leaves((args[shape_only:], kwargs)) if isinstance(leaf, Tensor)]
        if not inputs and outputs and any(a.name == "dtype" for a in schema.arguments):
            given["dtype"] = outputs[0].dtype  # else it would follow torch's default dtype
        is_literal = schema.name in ("aten::lift_fresh", "aten::lift_fresh_copy")  # torch.tensor([1, 2])
        needs: set[int] = set()
        try:
            first = [self._empty(args[0], needs)] if shape_only else []
            encoded = [self._encode(value, needs, is_literal=is_literal) for value in args[shape_only:]]
            named = {name: self._encode(value, needs) for name, value in given.items()}
        except NotPointwiseError:
            return False
        node = Node(".".join(filter(None, name_and_overload(func))), (*first, *encoded), named)
        read = frozenset(storage_id(tensor) for tensor in inputs if isinstance(tensor, FakeTensor))
        fresh = {storage_id(out): out.untyped_storage().nbytes() for out in outputs if storage_id(out) not in read}
        number = self._add(node, frozenset(needs), read, writes, sum(fresh.values()))
        for item, output in enumerate(outputs):
            self.alive.append(output.untyped_storage())
            # an in-place operator returns its argument, which an earlier entry has made
            if not writes or _view(output) not in self.results:
                self.results[_view(output)] = number, None if isinstance(result, Tensor) else item
        return True

    def constant(self, tensor: Tensor) -> Constant:
        """Return the constant that a tensor is now: the operators that compute it, and its values if they are few.

        Raises:
            NotPointwiseError: If a tensor in it was not recorded, or it takes too much memory or too many operators.
        """
        if _view(tensor) not in self.results:
            msg = "it is not computed from constants alone"
            raise NotPointwiseError(msg)
        number, item = self.results[_view(tensor)]
        needed, storages = {number}, {storage_id(tensor)}
        chosen: list[_Entry] = []
        for entry in reversed(self.entries):
            if entry.number in needed or storages & entry.writes:
                chosen.append(entry)
                needed |= entry.needs
                storages |= entry.inputs
            if len(chosen) > _MAX_NODES:
                msg = f"it is computed by more than {_MAX_NODES} operators"
                raise NotPointwiseError(msg)
        chosen.reverse()
        if (total := tensor.nbytes + sum(entry.num_bytes for entry in chosen)) > MAX_CONSTANT_BYTES:
            msg = f"it is computed from constants of {human_bytes(total)}"
            raise NotPointwiseError(msg)
        numbers = {entry.number: place for place, entry in enumerate(chosen)}
        nodes = [Node(e.node.op, _renumber(e.node.args, numbers), _renumber(e.node.kwargs, numbers)) for e in chosen]
        if numbers[number] != len(nodes) - 1 or item is not None:  # it was written in place after it was made
            nodes.append(Node("alias", (_reference(numbers[number], item),)))
        shape, dtype = tuple(tensor.shape), _name(tensor.dtype)
        return _checked(Constant(shape, dtype, nodes, default_dtype=_name(torch.get_default_dtype())))

    def _add(self, node: Node, needs: frozenset[int], inputs: frozenset[int], writes: frozenset[int], num_bytes: int) -> int:
        self.entries.append(_Entry(len(self.entries), node, needs, inputs, writes, num_bytes))
        return len(self.entries) - 1

    def _empty(self, like: Tensor, needs: set[int]) -> dict[str, int]:
        """Record an empty tensor in place of a tensor of which only shape and dtype are used."""
        node = Node("empty.memory_format", (tuple(like.shape),), {"dtype": {"dtype": _name(like.dtype)}})
        number = self._add(node, frozenset(), frozenset(), frozenset(), like.nbytes)
        needs.add(number)
        return _reference(number, None)

    def _encode(self, value: Any, needs: set[int], *, is_literal: bool = False) -> Any:
        match value:
            case FakeTensor() if _view(value) in self.results:
                number, item = self.results[_view(value)]
                needs.add(number)
                return _reference(number, item)
            case Tensor() if is_literal and not isinstance(value, FakeTensor) and value.numel() <= _MAX_LITERAL:
                return {"tensor": _values(value), "shape": list(value.shape), "dtype": _name(value.dtype)}
            case torch.dtype() | torch.memory_format():
                return {type(value).__name__: _name(value)}
            case torch.device() | torch.layout():
                return None
            case list() | tuple():
                return [self._encode(item, needs) for item in value]
            case None | bool() | int() | str() | float():
                return to_argument(value)
            case _:
                msg = f"{value!r} cannot be written down"
                raise NotPointwiseError(msg)


def _checked(constant: Constant) -> Constant:
    """Compute a constant once, to check that it can be computed; keep its values if they are few."""
    try:
        with _disable_current_modes():
            computed = compute(constant)
            blank = any(node.op.startswith(("empty", "new_empty")) for node in constant.nodes)
            is_filled = not blank or _same(computed, compute(constant, blank=1))
    except Exception as error:
        msg = f"computing it again fails: {error}"
        raise NotPointwiseError(msg) from error
    if tuple(computed.shape) != constant.shape or _name(computed.dtype) != constant.dtype:
        msg = "computing it again gives another shape or dtype"
        raise NotPointwiseError(msg)
    if not is_filled:
        msg = "it holds memory that no code has written"
        raise NotPointwiseError(msg)
    return evolve(constant, values=_values(computed)) if computed.numel() <= _MAX_STORED else constant


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124  NaN


def _values(tensor: Tensor) -> list[Any]:
    if tensor.is_complex():
        msg = "complex numbers cannot be written down"
        raise NotPointwiseError(msg)
    with _disable_current_modes():
        return [to_plain(item) for item in tensor.detach().reshape(-1).tolist()]


def _reference(number: int, item: int | None) -> dict[str, int]:
    return {"node": number} if item is None else {"node": number, "item": item}


def _renumber(value: Any, numbers: Mapping[int, int]) -> Any:
    match value:
        case {"node": number, **rest}:
            return {"node": numbers[number], **rest}
        case Mapping():
            return {name: _renumber(item, numbers) for name, item in value.items()}
        case tuple():
            return tuple(_renumber(item, numbers) for item in value)
        case _:
            return value


def _name(torch_constant: object) -> str:
    return str(torch_constant).removeprefix("torch.")
