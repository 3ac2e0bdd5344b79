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

from ..specs.dtypes import human_bytes
from ..specs.plain import to_plain
from ..specs.program import Constant, Node
from .constants import compute
from .pointwise import NotPointwiseError, operator_name

MAX_CONSTANT_BYTES = 32 * 2**20
"""Most bytes that computing one constant may take; each rank does it by itself."""

_MAX_STORED = 1024  # elements whose values the plan has
_MAX_WRITTEN = 4096  # elements of a tensor that is written down in the code
_PLACES = frozenset({"device", "layout", "pin_memory", "generator"})


@frozen
class _Entry:
    number: int
    node: Node
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    writes: frozenset[int]
    num_bytes: int


@define
class Tape:
    """What has been recorded. Tensors are known by identity, and kept, so that no identity is used again."""

    entries: list[_Entry] = Factory(list)
    places: dict[int, tuple[int, int | None]] = Factory(dict)
    kept: list[Tensor] = Factory(list)

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, writes: frozenset[int]) -> bool:
        """Note an operator; return False if it cannot be computed again.

        Args:
            func: The operator.
            args: Its arguments; tensors are those of earlier entries, or a few numbers that the code has written down.
            kwargs: Its keyword arguments.
            result: What it gave.
            writes: Storages that it wrote in place.
        """
        schema = func._schema  # noqa: SLF001  torch says it nowhere else
        if not schema.name.startswith("aten::") or not all(isinstance(out, Tensor) for out in tree_leaves(result)):
            return False
        outputs = tuple(tree_leaves(result))
        given = {name: value for name, value in kwargs.items() if name not in _PLACES}
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))) and any(
            a.name == "dtype" for a in schema.arguments
        ):
            given["dtype"] = outputs[0].dtype  # else it would follow torch's default dtype
        is_written_down = schema.name in ("aten::lift_fresh", "aten::lift_fresh_copy")  # torch.tensor([1, 2])
        try:
            node = Node(
                ".".join(filter(None, operator_name(func))),
                tuple(self._encode(value, is_written_down=is_written_down) for value in args),
                {name: self._encode(value) for name, value in given.items()},
            )
        except NotPointwiseError:
            return False
        inputs = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        fresh = {_storage(t): t.untyped_storage().nbytes() for t in outputs if isinstance(t, FakeTensor)}
        num_bytes = sum(size for storage, size in fresh.items() if storage not in {_storage(t) for t in inputs})
        self._add(
            _Entry(len(self.entries), node, inputs, outputs, writes, num_bytes), several=not isinstance(result, Tensor)
        )
        return True

    def empty(self, like: Tensor) -> None:
        """Note a tensor of which only shape and dtype are used, as an empty one."""
        node = Node("empty.memory_format", (tuple(like.shape),), {"dtype": {"dtype": _name(like.dtype)}})
        self._add(_Entry(len(self.entries), node, (), (like,), frozenset(), like.nbytes), several=False)

    def constant(self, tensor: Tensor) -> Constant:
        """Return what makes a tensor, as it is now.

        Raises:
            NotPointwiseError: If something in it was not recorded, or it takes too much memory.
        """
        needed, storages, chosen = {id(tensor)}, {_storage(tensor)}, []
        for entry in reversed(self.entries):
            if needed.intersection(map(id, entry.outputs)) or storages & entry.writes:
                chosen.append(entry)
                needed.update(map(id, entry.inputs))
                storages.update(map(_storage, entry.inputs))
        chosen.reverse()
        if (total := tensor.nbytes + sum(entry.num_bytes for entry in chosen)) > MAX_CONSTANT_BYTES:
            msg = f"it is computed from constants of {human_bytes(total)}"
            raise NotPointwiseError(msg)
        if id(tensor) not in self.places:
            msg = "it is not computed from constants alone"
            raise NotPointwiseError(msg)
        numbers = {entry.number: number for number, entry in enumerate(chosen)}
        nodes = [Node(e.node.op, _renumber(e.node.args, numbers), _renumber(e.node.kwargs, numbers)) for e in chosen]
        number, item = self.places[id(tensor)]
        if numbers[number] != len(nodes) - 1 or item is not None:  # something was written in place after it was made
            nodes.append(Node("alias", (_reference(numbers[number], item),)))
        return _checked(Constant(tuple(tensor.shape), _name(tensor.dtype), nodes))

    def _add(self, entry: _Entry, *, several: bool) -> None:
        self.entries.append(entry)
        self.kept += [*entry.inputs, *entry.outputs]
        for item, output in enumerate(entry.outputs):
            # an operator in place gives back the tensor that it was given
            if id(output) not in self.places or not entry.writes:
                self.places[id(output)] = entry.number, item if several else None

    def _encode(self, value: Any, *, is_written_down: bool = False) -> Any:
        match value:
            case FakeTensor() if id(value) in self.places:
                return _reference(*self.places[id(value)])
            case Tensor() if is_written_down and not isinstance(value, FakeTensor) and value.numel() <= _MAX_WRITTEN:
                return {"tensor": _values(value), "shape": list(value.shape), "dtype": _name(value.dtype)}
            case torch.dtype() | torch.memory_format():
                return {type(value).__name__: _name(value)}
            case torch.device() | torch.layout():
                return None
            case list() | tuple():
                return [self._encode(item) for item in value]
            case None | bool() | int() | str() | float():
                return to_plain(value)
            case _:
                msg = f"{value!r} cannot be written down"
                raise NotPointwiseError(msg)


def _checked(constant: Constant) -> Constant:
    """Compute a constant once, to know that it can be; keep its values if they are few."""
    try:
        with _disable_current_modes():
            computed = compute(constant)
    except Exception as error:
        msg = f"computing it again fails: {error}"
        raise NotPointwiseError(msg) from error
    if tuple(computed.shape) != constant.shape or _name(computed.dtype) != constant.dtype:
        msg = "computing it again gives another shape or dtype"
        raise NotPointwiseError(msg)
    return evolve(constant, values=_values(computed)) if computed.numel() <= _MAX_STORED else constant


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
    return tensor.untyped_storage()._cdata  # noqa: SLF001  torch says it nowhere else
