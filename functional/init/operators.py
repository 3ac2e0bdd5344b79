"""Translate torch's operators to the operations of init programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.utils._pytree import tree_leaves

from ...specs.json_values import to_argument
from ...specs.program import (
    Bernoulli,
    Cauchy,
    Constant,
    Draw,
    Exponential,
    Fill,
    Geometric,
    LogNormal,
    Map,
    Normal,
    Operation,
    Set,
    TruncatedNormal,
    Uniform,
    What,
)

# a new distribution: its record in specs/program.py, its operator here, its inverse in distributions.py
_DRAWS: Mapping[str, Any] = {
    "normal_": Normal,
    "uniform_": Uniform,
    "exponential_": Exponential,
    "log_normal_": LogNormal,
    "bernoulli_.float": Bernoulli,
    "cauchy_": Cauchy,
    "geometric_": Geometric,
}
_RANDOM_FACTORIES: Mapping[str, Draw] = {"randn": Normal(0, 1), "rand": Uniform(0, 1)}
_OVERWRITING = frozenset(
    f"{name}_"
    for name in (
        *("bernoulli", "cauchy", "copy", "exponential", "fill", "geometric"),
        *("log_normal", "normal", "random", "uniform", "zero"),
    )
)
_UNTAGGED = frozenset(["masked_fill_.Scalar", "masked_fill_.Tensor"])  # pointwise operators that torch does not tag so
_TRUNC_NORMAL = getattr(getattr(init, "_no_grad_trunc_normal_", None), "__code__", None)


class NotPointwiseError(ValueError):
    """Code writes a tensor in a way that no init program expresses; the message says why."""


def name_and_overload(func: Any) -> tuple[str, str]:
    """Return the name of an operator, and the name of its overload.

    >>> name_and_overload(torch.ops.aten.mul_.Tensor)
    ('mul_', 'Tensor')
    """
    schema = func._schema  # noqa: SLF001  torch has no public name for it
    return schema.name.partition("::")[2], schema.overload_name


def is_random(func: Any) -> bool:
    """Tell whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def is_view(func: Any) -> bool:
    """Tell whether an operator returns a view of its argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)  # noqa: SLF001


def needs_shape_only(func: Any) -> bool:
    """Tell whether an operator uses only the shape and dtype of a tensor: ``zeros_like``, ``new_empty``."""
    packet, _ = name_and_overload(func)
    return packet.endswith("_like") or packet.startswith("new_")


def arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operator writes, and the tensors that it reads."""
    declared = func._schema.arguments  # noqa: SLF001
    by_name = {argument.name: argument for argument in declared}
    given = [*zip(declared, args, strict=False), *((by_name[k], v) for k, v in kwargs.items() if k in by_name)]
    changed: list[Tensor] = []
    read: list[Tensor] = []
    for argument, value in given:
        is_write = argument.alias_info is not None and argument.alias_info.is_write
        (changed if is_write else read).extend(
            leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout == torch.strided
        )
    return changed, read


def overwrites(func: Any) -> bool:
    """Tell whether an in-place operator ignores the values before it."""
    packet, overload = name_and_overload(func)
    return packet in _OVERWRITING or overload.endswith("out")


def factory_operations(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> tuple[Operation, ...]:
    """Return the operations of a tensor that a factory made: ``randn``, ``zeros_like``.

    Raises:
        NotPointwiseError: If the operator is no factory of equal or of independent elements.
    """
    packet, _ = name_and_overload(func)
    name = packet.removeprefix("new_").removesuffix("_like")
    if kwargs.get("generator") is not None:
        msg = "it draws from a generator of its own"
        raise NotPointwiseError(msg)
    if name in _RANDOM_FACTORIES and result.is_floating_point():
        return (Operation(_RANDOM_FACTORIES[name]),)
    match name, args:
        case "empty", _:
            return ()
        case "zeros" | "ones", _:
            return (Operation(Fill(int(name == "ones"))),)
        case "full", (*_, bool() | int() | float() as value):
            return (Operation(Fill(value)),)
        case _:
            msg = f"{packet} is not pointwise"
            raise NotPointwiseError(msg)


def operation_kind(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: Tensor,
    constant: Callable[[Tensor], Constant],
) -> What:
    """Return the operation of an init program that an in-place operator performs on each element.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Its keyword arguments.
        target: The tensor that it writes, its first argument.
        constant: Returns another argument as a constant, in the shape and order of ``target``.

    Raises:
        NotPointwiseError: If the operator mixes elements, or takes a tensor that is not constant.
    """
    packet, overload = name_and_overload(func)
    name = f"{packet}.{overload}" if overload else packet
    if name in _DRAWS:
        if kwargs.get("generator") is not None:
            msg = "it draws from a generator of its own"
            raise NotPointwiseError(msg)
        if not target.is_floating_point():
            msg = f"{packet.strip('_')} draws into {target.dtype}"
            raise NotPointwiseError(msg)
        declared = [a for a in func._schema.arguments[1:] if a.name != "generator"]  # noqa: SLF001
        given = {**dict(zip((a.name for a in declared), args[1:], strict=False)), **kwargs}
        try:
            return _DRAWS[name](*(given.get(a.name, a.default_value) for a in declared))
        except (TypeError, ValueError) as error:
            msg = f"{packet.strip('_')} is asked for what it cannot give: {error}"
            raise NotPointwiseError(msg) from None
    match packet, args:
        case "zero_", _:
            return Fill(0)
        case "fill_", (_, bool() | int() | float() as value):
            return Fill(value)
        case "fill_" | "copy_", (_, Tensor() as source, *_):
            return Set(constant(source))
        case _:
            return pointwise_map(func, args, kwargs, constant)


def pointwise_map(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], constant: Callable[[Tensor], Constant]
) -> Map:
    """Return a pointwise operator in its in-place form; the arguments are the same as of ``operation_kind``."""
    packet, overload = name_and_overload(func)
    in_place = packet if packet.endswith("_") else f"{packet}_"
    name = f"{in_place}.{overload}" if overload else in_place
    found = getattr(getattr(torch.ops.aten, in_place, None), overload or "default", None)
    if found is None or (torch.Tag.pointwise not in found.tags and name not in _UNTAGGED) or is_random(found):
        msg = f"{packet.strip('_')} is not pointwise"
        raise NotPointwiseError(msg)
    constants: list[Constant] = []

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return to_argument(value)
        constants.append(constant(value))
        return {"node": len(constants) - 1}

    given = tuple(plain(value) for value in args[1:])
    named = {key: plain(value) for key, value in kwargs.items()}
    try:
        return Map(name, given, named, tuple(constants))
    except ValueError:  # a complex number, say
        msg = f"{packet.strip('_')} has an argument that cannot be written down"
        raise NotPointwiseError(msg) from None


def truncated_normal_of_torch() -> tuple[Tensor, TruncatedNormal] | None:
    """Return the tensor and the arguments of ``torch.nn.init.trunc_normal_``, None if it is not running now.

    It draws again until every element is inside: a loop that depends on data, which fake tensors cannot follow, while its
    arguments tell the distribution. Other code that looks at its draws is not followed: its outcome is not known.
    """
    frame = sys._getframe()  # noqa: SLF001  only the stack tells who asks
    while frame is not None:
        if frame.f_code is _TRUNC_NORMAL:
            given: dict[str, Any] = frame.f_locals
            try:
                return given["tensor"], TruncatedNormal(given["mean"], given["std"], given["a"], given["b"])
            except ValueError:  # an infinite or empty interval
                return None
        frame = frame.f_back
    return None
