"""Calls of operators on real tensors, in the form in which rules are asked about them."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
import unittest
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from attrs import Factory, field, frozen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from shardplan.functional.types.relation import Operand, OperatorCall


@frozen(eq=False)
class Sample:
    """A call of an operator on real tensors.

    Args:
        operator: The operator, an overload.
        arguments: Its arguments by name, with defaults.
    """

    operator: Any
    arguments: Mapping[str, Any]
    results: tuple[torch.Tensor, ...] = field(
        init=False, default=Factory(lambda self: run(self.operator, self.arguments), takes_self=True)
    )

    @property
    def name(self) -> str:
        return self.operator._schema.name.removeprefix("aten::")

    @property
    def operands(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(dict(self.arguments)) if isinstance(leaf, torch.Tensor)]

    @property
    def call(self) -> OperatorCall:
        """What a rule is asked about."""
        numbers = itertools.count()
        named = each_tensor(self.arguments, lambda met: Operand(next(numbers), tuple(met.shape), met.dtype is torch.bool))
        operands = tuple(leaf for leaf in tree_leaves(named) if isinstance(leaf, Operand))
        shapes = tuple(tuple(result.shape) for result in self.results)
        return OperatorCall(self.name, named, operands, shapes, torch.Tag.pointwise in self.operator.tags)

    @property
    def is_random(self) -> bool:
        """Whether its results depend on random numbers."""
        if torch.Tag.nondeterministic_seeded not in self.operator.tags:
            return False
        others = run(self.operator, self.arguments, seed=1)
        return not all(torch.equal(made, other) for made, other in zip(self.results, others, strict=True))

    def run_on(self, operands: Iterable[torch.Tensor], **changed: Any) -> tuple[torch.Tensor, ...]:
        """Run the operator on other operands."""
        given = iter(operands)
        return run(self.operator, {**each_tensor(self.arguments, lambda _: next(given)), **changed})


def each_tensor(arguments: Mapping[str, Any], change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return tree_map_only(torch.Tensor, change, dict(arguments))


def run(operator: Any, arguments: Mapping[str, Any], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Run an operator on copies of its operands, with the same random numbers every time."""
    copies = each_tensor(arguments, torch.clone)
    schema = operator._schema.arguments
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` notes where it is called, for each kind of device
        made = operator(
            *(copies[argument.name] for argument in schema if not argument.kwarg_only),
            **{argument.name: copies[argument.name] for argument in schema if argument.kwarg_only},
        )
    return tuple(leaf.clone() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))


def sample(operator: Any, *args: Any, **kwargs: Any) -> Sample:
    """Return a call of an operator, with all its arguments by name."""
    named: dict[str, Any] = {}
    operator(*tree_map_only(torch.Tensor, torch.clone, args), **tree_map_only(torch.Tensor, torch.clone, kwargs))
    for place, argument in enumerate(operator._schema.arguments):
        if place < len(args):
            named[argument.name] = args[place]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return Sample(operator, named)


class _Calls(TorchDispatchMode):
    """Collects the calls that reach the dispatcher below autograd."""

    def __init__(self, found: dict[Any, tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        sees_memory = "as_strided" in str(func)  # copies have other memory
        if (
            tensors
            and not sees_memory
            and all(0 < tensor.numel() < 20_000 and tensor.layout is torch.strided for tensor in tensors)
        ):
            kind = (func, tuple(min(n, 2) for t in tensors for n in (*t.shape, -1)), _other(args), _other(kwargs or {}))
            if kind not in self.found:
                copied = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
                self.found[kind] = (func, *copied)
        return func(*args, **(kwargs or {}))


def _other(arguments: Any) -> str:
    return str(tree_map_only(torch.Tensor, lambda _: "tensor", arguments))


def dispatched(limit: int = 60, most: int = 30) -> Iterator[Sample]:
    """Iterate over calls that reach the dispatcher in torch's own samples.

    Args:
        limit: How many samples of each of torch's functions to look at.
        most: How many calls of an operator to give, of different kinds.
    """
    found: dict[Any, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in _torch_samples():
            dtype = next((d for d in _DTYPES if d in info.supported_dtypes("cpu")), None)
            if dtype is None or info.name.startswith(_ON_GPU):
                continue
            for given in _samples_of(info, dtype, limit):
                with _Calls(found), torch.no_grad():
                    info(given.input, *given.args, **given.kwargs)
    kept: dict[Any, int] = {}
    for func, args, kwargs in sorted(found.values(), key=_num_long_axes, reverse=True):
        kept[func] = kept.get(func, 0) + 1
        if kept[func] <= most:
            yield sample(func, *args, **kwargs)


def undispatched(names: Collection[str], limit: int = 60, most: int = 30) -> Iterator[Sample]:
    """Iterate over calls of operators that torch takes apart before they reach the dispatcher, in torch's own samples.

    Args:
        names: The operators.
        limit: How many samples of each of torch's functions to look at.
        most: How many calls of an operator to give.
    """
    for info in _torch_samples():
        name = info.name.removeprefix("nn.functional.").replace(".", "_")
        if name not in names or torch.float64 not in info.supported_dtypes("cpu"):
            continue
        packet, num = getattr(torch.ops.aten, name), 0
        for given in _samples_of(info, torch.float64, limit):
            for overload in packet.overloads():
                with contextlib.suppress(TypeError, RuntimeError, ValueError):  # the sample is of another overload
                    if num < most and "out" not in overload:
                        yield sample(getattr(packet, overload), given.input, *given.args, **given.kwargs)
                        num += 1
                        break


_DTYPES = (torch.float64, torch.int64, torch.complex128)
_ON_GPU = ("jiterator",)


def _num_long_axes(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> int:
    return sum(n > 1 for leaf in tree_leaves(call[1:]) if isinstance(leaf, torch.Tensor) for n in leaf.shape)


def _samples_of(info: Any, dtype: torch.dtype, limit: int) -> Iterator[Any]:
    # its public method looks for the test that calls it, each time
    torch.default_generator.manual_seed(0)
    yield from itertools.islice(info.sample_inputs_func(info, "cpu", dtype, False), limit)


def _torch_samples() -> list[Any]:
    # torch's samples stand in a module that imports a test library of which it needs nothing here
    stand_in = ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.setdefault("expecttest", stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch.testing._internal.common_methods_invocations").op_db
