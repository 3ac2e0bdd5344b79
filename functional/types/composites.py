"""Functions of torch that are recorded as one call, though they run several operators.

Which operators they run depends on sizes, strides and flags, so that a whole and a local model could run different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NAMES = (
    *("matmul", "linear", "bilinear", "einsum", "tensordot", "inner", "scaled_dot_product_attention"),
    *("reshape", "flatten", "unflatten", "ravel", "repeat_interleave"),
    *("rms_norm", "group_norm", "instance_norm", "batch_norm"),
    *("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_"),
    *("feature_alpha_dropout", "feature_alpha_dropout_"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
)
"""Operators that are recorded as one call."""

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")

Record = Callable[[Any, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""Runs a function of torch and records it as one call: of an operator, the function, its arguments."""


class Composites(TorchFunctionMode):
    """Hand functions that are recorded as one call to ``record``, within the block; also custom operators.

    Args:
        record: Takes the operator, the function to run, and its arguments.
        hooked: Takes a tensor, a hook that was registered on its gradient, and the hook's handle.
    """

    def __init__(self, record: Record, hooked: Callable[..., None]) -> None:
        super().__init__()
        self._record = record
        self._hooked = hooked
        self._globals: dict[int, dict[str, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):  # noqa: SLF001  the class of all operators
            if func.namespace in ("aten", "prim", "prims"):
                return func(*args, **kwargs)
            return self._record(func, func, args, kwargs)
        if func is Tensor.register_hook:
            with torch._C.DisableTorchFunction():  # noqa: SLF001  it would come here again
                handle = func(*args, **kwargs)
                self._hooked(*args, *kwargs.values(), handle)
            return handle
        if (name := _OPERATORS.get(func)) is not None:
            args, kwargs = _as_in_schema(name, args, kwargs)
            return self._record(_overload(name, args, kwargs), func, args, kwargs)
        if isinstance(func, FunctionType) and (body := self._without_check(func)) is not None:
            with self:  # what it calls comes here too
                return body(*args, **kwargs)
        return func(*args, **kwargs)

    def _without_check(self, func: FunctionType) -> FunctionType | None:
        """Return a copy of one of torch's Python functions that does not ask for a mode before it runs."""
        if not any(name in func.__globals__ for name in _CHECKS if name in func.__code__.co_names):
            return None
        known = self._globals.get(id(func.__globals__))
        if known is None:
            known = self._globals[id(func.__globals__)] = func.__globals__ | dict.fromkeys(_CHECKS, _never)
        body = FunctionType(func.__code__, known, func.__name__, func.__defaults__, func.__closure__)
        body.__kwdefaults__ = func.__kwdefaults__
        return body


def _never(*_: object) -> bool:
    return False


def _functions() -> dict[Any, str]:
    homes = (torch, Tensor, getattr(torch._C, "_nn"))  # noqa: B009, SLF001  the home of linear
    found = {getattr(home, name): name for name in _NAMES for home in homes if hasattr(home, name)}
    return found | {Tensor.__matmul__: "matmul"}


_OPERATORS = _functions()


def _as_in_schema(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a function as its operator takes them."""
    match name:
        case "reshape" if len(args) > 1 and not isinstance(args[1], Sequence):
            args = (args[0], args[1:])
        case "einsum":
            operands = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]  # noqa: PLR2004
            args = (args[0], list(operands))
        case _:
            pass
    return tuple(args), dict(kwargs)


def _overload(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the operator that takes some arguments."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return next((found for found in overloads if _fits(found, args, kwargs)), overloads[0])


def _fits(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether arguments are tensors where an operator takes tensors, and lists where it takes lists."""
    taken = {argument.name: argument for argument in overload._schema.arguments}  # noqa: SLF001  the operator's signature
    by_place = [name for name, argument in taken.items() if not argument.kwarg_only]
    given = dict(zip(by_place, args, strict=False)) | {_in_schema(name, taken): value for name, value in kwargs.items()}
    return len(args) <= len(by_place) and all(
        name in taken and _is_of_kind(value, taken[name]) for name, value in given.items()
    )


def _in_schema(name: str, taken: Container[str]) -> str:
    """Return the name that an operator has for an argument: functions of torch name the first ``input``."""
    return "self" if name == "input" and name not in taken else name


def _is_of_kind(value: Any, argument: Any) -> bool:
    kind = str(argument.type)
    return value is None or isinstance(value, Tensor) == ("Tensor" in kind and "List" not in kind)
