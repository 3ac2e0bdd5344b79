"""The operators that compute tensors on the side, recorded so that they can be computed again."""

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
from .constants import compute
from .operators import NotPointwiseError, operator_name

MAX_CONSTANT_BYTES = 32 * 2**20
"""Most bytes that computing one constant may take; each rank does it by itself."""

_MAX_NODES = 256
_MAX_STORED = 1024  # elements whose values the plan has
_MAX_WRITTEN = 4096  # elements of a tensor that is written down in the code
_PLACES = frozenset({"device", "layout", "pin_memory", "generator"})

Identity = tuple[object, ...]
"""What a tensor is made of: storage, offset, shape, stride, dtype. Code may exchange it: ``x.data = y``."""


def identity(tensor: Tensor) -> Identity:
    """Return what a tensor is made of now."""
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@frozen
class _Entry:
    number: int
    node: Node
    needs: frozenset[int]
    inputs: frozenset[int]
    writes: frozenset[int]
    num_bytes: int


@define
class Tape:
    """What has been recorded. Storages are kept, so that the identity of none is used again."""

    entries: list[_Entry] = Factory(list)
    places: dict[Identity, tuple[int, int | None]] = Factory(dict)
    kept: list[object] = Factory(list)

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
        """Note an operator; return False if it cannot be computed again.

        Args:
            func: The operator.
            args: Its arguments; tensors are those of earlier entries, or a few numbers that the code has written down.
            kwargs: Its keyword arguments.
            result: What it gave.
            writes: Storages that it wrote in place.
            shape_only: Whether it takes its first argument for shape and dtype alone.
        """
        schema = func._schema  # noqa: SLF001  torch says it nowhere else
        if not schema.name.startswith("aten::") or not all(isinstance(out, Tensor) for out in tree_leaves(result)):
            return False
        outputs: list[Tensor] = tree_leaves(result)
        given = {name: value for name, value in kwargs.items() if name not in _PLACES}
        inputs = [leaf for leaf in tree_leaves((args[shape_only:], kwargs)) if isinstance(leaf, Tensor)]
        if not inputs and outputs and any(a.name == "dtype" for a in schema.arguments):
            given["dtype"] = outputs[0].dtype  # else it would follow torch's default dtype
        is_written_down = schema.name in ("aten::lift_fresh", "aten::lift_fresh_copy")  # torch.tensor([1, 2])
        needs: set[int] = set()
        try:
            first = [self._empty(args[0], needs)] if shape_only else []
            written = [self._encode(value, needs, is_written_down=is_written_down) for value in args[shape_only:]]
            named = {name: self._encode(value, needs) for name, value in given.items()}
        except NotPointwiseError:
            return False
        node = Node(".".join(filter(None, operator_name(func))), (*first, *written), named)
        read = frozenset(_storage(tensor) for tensor in inputs if isinstance(tensor, FakeTensor))
        fresh = {_storage(out): out.untyped_storage().nbytes() for out in outputs if _storage(out) not in read}
        number = self._add(node, frozenset(needs), read, writes, sum(fresh.values()))
        for item, output in enumerate(outputs):
            self.kept.append(output.untyped_storage())
            # an operator in place gives back the tensor that it was given
            if not writes or identity(output) not in self.places:
                self.places[identity(output)] = number, None if isinstance(result, Tensor) else item
        return True

    def constant(self, tensor: Tensor) -> Constant:
        """Return what makes a tensor, as it is now.

        Raises:
            NotPointwiseError: If something in it was not recorded, or it takes too much memory or too many operators.
        """
        if identity(tensor) not in self.places:
            msg = "it is not computed from constants alone"
            raise NotPointwiseError(msg)
        number, item = self.places[identity(tensor)]
        needed, storages = {number}, {_storage(tensor)}
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
        if numbers[number] != len(nodes) - 1 or item is not None:  # something was written in place after it was made
            nodes.append(Node("alias", (_reference(numbers[number], item),)))
        shape, dtype = tuple(tensor.shape), _name(tensor.dtype)
        return _checked(Constant(shape, dtype, nodes, default_dtype=_name(torch.get_default_dtype())))

    def _add(self, node: Node, needs: frozenset[int], inputs: frozenset[int], writes: frozenset[int], num_bytes: int) -> int:
        self.entries.append(_Entry(len(self.entries), node, needs, inputs, writes, num_bytes))
        return len(self.entries) - 1

    def _empty(self, like: Tensor, needs: set[int]) -> dict[str, int]:
        """Note a tensor of which only shape and dtype are used, as an empty one."""
        node = Node("empty.memory_format", (tuple(like.shape),), {"dtype": {"dtype": _name(like.dtype)}})
        number = self._add(node, frozenset(), frozenset(), frozenset(), like.nbytes)
        needs.add(number)
        return _reference(number, None)

    def _encode(self, value: Any, needs: set[int], *, is_written_down: bool = False) -> Any:
        match value:
            case FakeTensor() if identity(value) in self.places:
                number, item = self.places[identity(value)]
                needs.add(number)
                return _reference(number, item)
            case Tensor() if is_written_down and not isinstance(value, FakeTensor) and value.numel() <= _MAX_WRITTEN:
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
    """Compute a constant once, to know that it can be; keep its values if they are few."""
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
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124  what is not itself is no number


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


def _name(what: object) -> str:
    return str(what).removeprefix("torch.")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  the only identity of a fake storage
