"""Computation in double precision without chance: casts to less are lifted, and random operators give constants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

_aten = torch.ops.aten

LIFTED = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
"""The dtypes that are computed in a higher precision."""

_CHECKS = {_aten._assert_tensor_metadata.default}  # noqa: SLF001  an export's checks of the dtypes that it saw
_PLACES = (_aten.lift_fresh.default, _aten.lift_fresh_copy.default)
_RANDOM = {
    *("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "native_dropout", "normal", "poisson"),
    *("rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "uniform", "_fused_dropout"),
    "random",
}
"""Operators whose results are random; torch's tag is also on operators that draw for one value of an argument alone."""
_KEPT = 0.7
"""In place of a random number below 1: code that drops what lies below, or above, its usual rates drops nothing."""
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default}


@frozen
class Draw:
    """Random numbers that a module has drawn.

    Args:
        module: Path of the module.
        op: The operator.
        shape: Shape of the result.
        values: The numbers; None where they are constants.
    """

    module: str
    op: str
    shape: tuple[int, ...]
    values: Tensor | None


class Exact(TorchDispatchMode):
    """A thread's computation in double precision.

    Args:
        where: Returns the path of the running module.
        is_random: Whether random operators draw numbers; else they give constants.
        halves: Whether sums of products are taken in two halves: the difference is that of another order of sums.

    Attributes:
        draws: The random numbers that were drawn.
        not_lifted: Operators that gave a lower precision all the same, with its relative spacing.
    """

    def __init__(self, where: Callable[[], str] = lambda: "", *, is_random: bool = False, halves: bool = False) -> None:
        super().__init__()
        self._where, self._is_random, self._halves = where, is_random, halves
        self.draws: list[Draw] = []
        self.not_lifted: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operator."""
        kwargs = kwargs or {}
        if func in _CHECKS:
            return None
        if func in _PLACES:
            return _lifted(func(*args, **kwargs))
        if any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            args, kwargs = tree_map(_lift, args), {name: _lift(value) for name, value in kwargs.items()}
        is_random = torch.Tag.nondeterministic_seeded in func.tags and _name(func) in _RANDOM
        if is_random and kwargs.get("generator") is None:  # code with a generator of its own draws the same everywhere
            return self._draw(func, args, kwargs)
        return self._checked(func, self._stand_in(func, args)(*args, **kwargs))

    def _stand_in(self, func: Any, args: Any) -> Callable[..., Any]:
        """Return what is called in place of an operator: in most cases the operator itself."""
        if _name(func) == "rrelu_with_noise" and not self._is_random:
            return _with_mean_slope
        if self._halves and func in _PRODUCTS:
            return partial(_in_halves, func)
        if func is _aten._grouped_mm.default and args[0].dtype == torch.float64:  # noqa: SLF001  its kernel takes no doubles
            return _grouped_mm
        return func

    def _checked(self, func: Any, result: Any) -> Any:
        """Return a result in double precision, and keep the operator if it has computed with less."""
        low = [value.dtype for value in tree_iter(result) if isinstance(value, Tensor) and value.dtype in LIFTED]
        if not low:
            return result
        self.not_lifted[f"{func} in {self._where() or 'the model'}"] = max(torch.finfo(dtype).eps for dtype in low)
        return tree_map(_lifted, result)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, where = _name(func), self._where()
        if name == "native_dropout" and not self._is_random:
            x, p = args[0], args[1]
            self.draws.append(Draw(where, name, tuple(x.shape), None))
            return x / (1 - p) if p < 1 else x * 0, torch.ones_like(x, dtype=torch.bool)
        result = func(*args, **kwargs)
        first = next(value for value in tree_iter(result) if isinstance(value, Tensor))
        mask = result[1] if name == "native_dropout" else first
        self.draws.append(Draw(where, name, tuple(mask.shape), mask.detach().clone() if self._is_random else None))
        if not self._is_random:
            first.copy_(_constant(func, args, first))
        return result


def _constant(func: Any, args: Any, drawn: Tensor) -> Tensor:
    """Return numbers that an operator may draw, and that do not depend on chance; dropout keeps all."""
    match _name(func):
        case "rand" | "rand_like":
            return torch.full_like(drawn, _KEPT)
        case "uniform":
            _, low, high = (*args[:3], *(0.0, 1.0)[len(args) - 1 :])
            return torch.full_like(drawn, low + _KEPT * (high - low))
        case "randperm":
            return torch.arange(drawn.numel(), dtype=drawn.dtype)
        case "randint" | "randint_like" | "random" if not drawn.is_floating_point():
            bounds = [value for value in args if isinstance(value, int)]
            return torch.full_like(drawn, bounds[0] if len(bounds) > 1 else 0)
        case _:
            return torch.ones_like(drawn) if drawn.is_floating_point() else torch.zeros_like(drawn)


def _with_mean_slope(x: Tensor, noise: Tensor, low: float, high: float, *_: Any) -> Tensor:
    """Return a leaky ReLU whose random slopes, which its gradient reads from ``noise``, are their mean."""
    noise.copy_(torch.where(x < 0, (low + high) / 2, 1.0))
    return x * noise


def _name(func: Any) -> str:
    return str(func.overloadpacket).removeprefix("aten.").removesuffix("_")


def _lift(value: Any) -> Any:
    return LIFTED.get(value, value) if isinstance(value, torch.dtype) else value


def _lifted(value: Any) -> Any:
    return value.to(LIFTED[value.dtype]) if isinstance(value, Tensor) and value.dtype in LIFTED else value


def _in_halves(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a product of matrices whose sums are taken in two halves."""
    *added, a, b = args
    axis = a.dim() - 1
    half = a.shape[axis] // 2
    if not half:
        return func(*args, **kwargs)
    parts = (half, a.shape[axis] - half)
    (a1, a2), (b1, b2) = a.split(parts, dim=axis), b.split(parts, dim=axis - 1)
    first = func(*added, a1, b1, **kwargs)
    product = torch.matmul(a2, b2)
    return first + kwargs.get("alpha", 1) * product


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Return the products of groups of rows or columns, which end at ``offs``: of matrices, or of stacks of them.

    [S, K] and [G, K, N] give [S, N]; [M, S] and [S, N] give [G, M, N]; [G, M, K] and [K, S] give [M, S].
    """
    if offs is None:
        return torch.bmm(a, b)
    edges = [0, *offs.tolist()]
    spans = [slice(start, stop) for start, stop in pairwise(edges)]
    if a.dim() == 2 and b.dim() == 2:  # noqa: PLR2004  matrices
        return torch.stack([a[:, span] @ b[span] for span in spans])
    if a.dim() == 2:  # noqa: PLR2004
        out = a.new_zeros(a.shape[0], b.shape[2])
        for span, matrix in zip(spans, b, strict=True):
            out[span] = a[span] @ matrix
        return out
    out = a.new_zeros(a.shape[1], b.shape[1])
    for span, matrix in zip(spans, a, strict=True):
        out[:, span] = matrix @ b[:, span]
    return out
