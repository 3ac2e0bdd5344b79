"""From torch's operators to the operations of init programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
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
    Uniform,
    What,
)

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
_BESIDES = frozenset(["masked_fill_.Scalar", "masked_fill_.Tensor"])  # pointwise, but not marked so by torch


class NotPointwiseError(ValueError):
    """Code does to a tensor what no init program says; the message is why."""


def operator_name(func: Any) -> tuple[str, str]:
    """Return the name of an operator, and that of its overload.

    >>> operator_name(torch.ops.aten.mul_.Tensor)
    ('mul_', 'Tensor')
    """
    schema = func._schema  # noqa: SLF001  torch says it nowhere else
    return schema.name.partition("::")[2], schema.overload_name


def is_random(func: Any) -> bool:
    """Tell whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def is_view(func: Any) -> bool:
    """Tell whether an operator gives a view of its argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)  # noqa: SLF001  torch says it nowhere else


def needs_shape_only(func: Any) -> bool:
    """Tell whether an operator takes a tensor for its shape and dtype alone: ``zeros_like``, ``new_empty``."""
    packet, _ = operator_name(func)
    return packet.endswith("_like") or packet.startswith("new_")


def arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operator writes, and those that it reads."""
    declared = func._schema.arguments  # noqa: SLF001  torch says it nowhere else
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
    """Tell whether an operator in place gives values without looking at those before."""
    packet, overload = operator_name(func)
    return packet in _OVERWRITING or overload.endswith("out")


def made(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> tuple[Operation, ...]:
    """Return the operations of a tensor that a factory made: ``randn``, ``zeros_like``.

    Raises:
        NotPointwiseError: If it is no factory of equal or of independent elements.
    """
    packet, _ = operator_name(func)
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


def written(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: Tensor,
    constant: Callable[[Tensor], Constant],
) -> What:
    """Return what an operator in place does to each element of ``target``, its first argument.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Its keyword arguments.
        target: What it writes.
        constant: Gives the constant that another tensor is, in the shape and order of ``target``.

    Raises:
        NotPointwiseError: If it mixes elements, or takes what is no constant.
    """
    packet, overload = operator_name(func)
    name = f"{packet}.{overload}" if overload else packet
    if name in _DRAWS:
        if kwargs.get("generator") is not None:
            msg = "it draws from a generator of its own"
            raise NotPointwiseError(msg)
        if not target.is_floating_point():
            msg = f"{packet.strip('_')} draws into {target.dtype}"
            raise NotPointwiseError(msg)
        declared = [a for a in func._schema.arguments[1:] if a.name != "generator"]  # noqa: SLF001  torch says it nowhere else
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
            return mapped(func, args, kwargs, constant)


def mapped(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], constant: Callable[[Tensor], Constant]) -> Map:
    """Return a pointwise operator, in place or not, as one in place; the arguments are those of ``written``."""
    packet, overload = operator_name(func)
    in_place = packet if packet.endswith("_") else f"{packet}_"
    name = f"{in_place}.{overload}" if overload else in_place
    found = getattr(getattr(torch.ops.aten, in_place, None), overload or "default", None)
    if found is None or (torch.Tag.pointwise not in found.tags and name not in _BESIDES) or is_random(found):
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
