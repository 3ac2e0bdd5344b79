"""Know values of fake tensors that depend on nothing but given values and constants: sizes of images, masks, positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .fake_values import Guesses, asks_for_value
from .read import storage_id

_MOST_ELEMENTS = 2**18
"""Elements of the largest tensor whose values are computed."""

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class KnownValues(TorchDispatchMode):
    """Compute small tensors beside the fake ones, within the block, where all that they depend on is known.

    Code that asks for a value gets it; zero if it is not known, but its own checks (``torch._check``) pass. An operator
    whose result has as many entries as a tensor says runs too; where that tensor is not known, as if all entries of the
    mask were true.
    """

    def __init__(self) -> None:
        super().__init__()
        self._guesses = Guesses()
        self._num_assumed = 0
        self._real: dict[int, Tensor] = {}  # by the identity of the fake tensor, which is kept alive
        self._kept: list[Tensor] = []
        self._checks: set[int] = set()  # tensors that say whether a check holds, of code on its own values
        self._changed: set[int] = set()  # memory of fake tensors into which unknown values were written

    @property
    def num_guesses(self) -> int:
        """How often code asked for what is not known."""
        return self._guesses.num + self._num_assumed

    def tell(self, tensor: Tensor, real: Tensor) -> None:
        """Say which values a fake tensor has; they stay unknown if they are on meta, or many."""
        self._real.pop(id(tensor), None)
        if not real.is_meta and real.layout == torch.strided and real.numel() <= _MOST_ELEMENTS:
            with _disable_current_modes(), torch.no_grad():
                self._keep(tensor, real.detach().cpu().clone())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # noqa: SLF001  sizes of tensors are asked for very often
            known = {id(tensor): self._known(tensor) for tensor in _tensors((args, kwargs))}
            if _is_function(func) and all(real is not None for real in known.values()):
                return self._beside(func, args, kwargs, known)
            if asks_for_value(func):
                return self._answer(args[0])
            self._changed |= {storage_id(tensor) for tensor in self._written(func, args, kwargs)}
            return self._with_assumed_size(func, args, kwargs, known)

    def _beside(self, func: Any, args: Any, kwargs: Any, known: Mapping[int, Tensor | None]) -> Any:
        """Run an operator on fake tensors, and on their values, which are all known."""

        def computed() -> Any:
            with _disable_current_modes(), torch.no_grad():
                real = func(*_replaced(args, known), **_replaced(kwargs, known))
                return real.zero_() if func._schema.name.removeprefix("aten::") in _EMPTY else real  # noqa: SLF001

        if not func._schema.returns or str(func._schema.returns[0].type) in ("number", "bool", "int", "float"):  # noqa: SLF001
            return computed()
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            real = computed()
            out = _mapped(real, _like)
        else:
            if any(tensor.numel() > _MOST_ELEMENTS for tensor in _tensors(out)):
                self._changed |= {storage_id(tensor) for tensor in self._written(func, args, kwargs)}
                return out
            real = computed()
        for tensor, value in zip(_tensors(out), _tensors(real), strict=True):
            self._keep(tensor, value)
        return out

    def _with_assumed_size(self, func: Any, args: Any, kwargs: Any, known: Mapping[int, Tensor | None]) -> Any:
        """Run an operator on fake tensors, some of which are not known: as if all entries of an unknown mask were true."""
        match func:
            case torch.ops.aten._is_all_true.default:  # noqa: SLF001  of torch._check_tensor_all
                self._kept.append(result := func(*args, **kwargs))
                self._checks.add(id(result))
                return result
            case torch.ops.aten.nonzero.default:
                self._num_assumed += 1
                (mask,) = args
                places = torch.empty(mask.numel(), mask.dim(), dtype=torch.long, device="cpu")
                if places.numel() <= _MOST_ELEMENTS:
                    with _disable_current_modes():
                        real = torch.ones(mask.shape, dtype=torch.bool).nonzero()
                    self._keep(places, real)
                return places
            case torch.ops.aten.masked_select.default:
                x, mask = torch.broadcast_tensors(*args)
                return torch.ops.aten.index.Tensor(x, self._places(mask, known.get(id(args[1]))))
            case torch.ops.aten.index.Tensor:
                indices = [place for index in args[1] for place in self._places(index, known.get(id(index)))]
                return func(args[0], indices)
            case _:
                return func(*args, **kwargs)

    def _answer(self, asked: Tensor) -> bool | int | float:
        if id(asked) in self._checks:
            self._num_assumed += 1
            return True
        return self._guesses.answer(asked)

    def _places(self, index: Any, real: Tensor | None) -> Sequence[Any]:
        """Return indices of numbers in place of a mask, one for each of its axes; another index as it is."""
        if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        self._num_assumed += real is None
        with _disable_current_modes():
            num = index.numel() if real is None else int(real.expand(index.shape).count_nonzero())
        return [torch.empty(num, dtype=torch.long, device="cpu") for _ in range(index.dim())]

    def _known(self, tensor: Tensor) -> Tensor | None:
        """Return the values of a tensor, None if they are not known."""
        if id(tensor) not in self._real and not isinstance(tensor, FakeTensor):
            self.tell(tensor, tensor)  # a copy, as code may change it in place, and it is the user's
        real = self._real.get(id(tensor))
        return None if real is None or storage_id(tensor) in self._changed else real

    def _keep(self, tensor: Tensor, real: Tensor) -> None:
        self._kept.append(tensor)
        self._real[id(tensor)] = real

    def _written(self, func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
        """Iterate over the tensors that an operator changes."""
        for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001  the operator's signature
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(args[place] if place < len(args) else kwargs.get(argument.name)):
                    self._kept.append(tensor)
                    yield tensor


class ReadLists(TorchFunctionMode):
    """Let ``torch.tensor`` read the tensors in a list one by one, within the block: it cannot read fake ones."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _FROM_LISTS and args and isinstance(args[-1], (list, tuple)):
            args = (*args[:-1], _mapped(args[-1], lambda item: item.tolist() if isinstance(item, Tensor) else item))
        return func(*args, **(kwargs or {}))


_FROM_LISTS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


def _is_function(func: Any) -> bool:
    """Tell whether an operator's results depend on its arguments alone."""
    return func.namespace in ("aten", "prims") and torch.Tag.nondeterministic_seeded not in func.tags


def _like(real: Any) -> Any:
    """Return a fake tensor for a real one, in the fake mode that is on."""
    if not isinstance(real, Tensor):
        return real
    return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cpu")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors among arguments, or results, of an operator."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, function) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(item, function) for name, item in value.items()}
    return function(value)


def _replaced(value: Any, known: Mapping[int, Tensor | None]) -> Any:
    """Return arguments with their values in place of fake tensors."""
    return _mapped(value, lambda item: known[id(item)] if isinstance(item, Tensor) else item)
