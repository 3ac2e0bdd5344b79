"""Sums around the products of bare tensors: no module is called for them that a synchronisation could stand at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ...specs.paths import module_of
from ..model.read import has_forward
from .collectives import all_reduce, sum_gradient

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ...specs.layout_steps import LayoutStep, SumProducts

_FACTORS: Mapping[str, tuple[int, ...]] = {
    "linear": (0, 1),
    "bilinear": (0, 1, 2),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "addr": (1, 2),
    "addbmm": (1, 2),
    "baddbmm": (1, 2),
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "__rmatmul__": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "mul": (0, 1),
    "multiply": (0, 1),
    "__mul__": (0, 1),
    "__rmul__": (0, 1),
    "conv1d": (0, 1),
    "conv2d": (0, 1),
    "conv3d": (0, 1),
}
"""Places of the factors among the arguments of operators that multiply; ``einsum`` takes them behind its equation."""

_VIEWS = frozenset({
    "t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "flatten", "contiguous", "to", "type_as",
    "__get__", "__getitem__", "select", "narrow", "swapaxes", "mT", "float", "half", "bfloat16",
})  # fmt: skip
"""Operators whose result stands for the tensor itself; ``__get__`` is that of ``.T`` and ``.mT``."""


def sum_products(model: nn.Module, step: SumProducts, group: str, around: Callable[..., Any]) -> None:
    """Let products with a tensor be summed while the code runs that has it: of the module around its own.

    Args:
        model: The model.
        step: The tensor, and what is summed.
        group: Name of the process group.
        around: Returns a context manager that is entered while the sum runs.
    """
    owner, path = model.get_submodule(step.module), module_of(step.module)
    while path and not has_forward(model.get_submodule(path)):
        path = module_of(path)
    host = model.get_submodule(path)
    inner = host.forward

    def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Products(owner, step, group, around):
            return inner(*args, **kwargs)

    host.forward = MethodType(forward, host)


class _Products(TorchFunctionMode):
    """Sums what products with a tensor give, or the gradients of what they take."""

    def __init__(
        self, owner: nn.Module, step: SumProducts, group: str, around: Callable[[LayoutStep], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self._owner, self._step, self._group, self._around = owner, step, group, around
        self._views: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _VIEWS and args and self._is_it(args[0]):
            view = func(*args, **kwargs)
            if isinstance(view, Tensor):
                self._views[id(view)] = view  # kept, so that no other tensor gets its id
            return view
        places = range(1, len(args)) if name == "einsum" else _FACTORS.get(name, ())
        if not any(self._holds_it(args[place]) for place in places if place < len(args)):
            return func(*args, **kwargs)
        if self._step.what == "outputs":
            product = func(*args, **kwargs)
            with self._around(self._step):
                return all_reduce(product, self._group)
        with self._around(self._step):
            taken = [tree_map(self._summed, arg) if place in places else arg for place, arg in enumerate(args)]
        return func(*taken, **kwargs)

    def _is_it(self, value: object) -> bool:
        return value is getattr(self._owner, self._step.name) or id(value) in self._views

    def _holds_it(self, value: object) -> bool:
        return any(map(self._is_it, value)) if isinstance(value, (list, tuple)) else self._is_it(value)

    def _summed(self, value: object) -> object:
        is_other = isinstance(value, Tensor) and value.is_floating_point() and not self._is_it(value)
        return sum_gradient(value, self._group) if is_other else value
