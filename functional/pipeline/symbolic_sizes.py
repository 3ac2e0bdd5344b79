"""Sizes of tensors while a model is exported: some are numbers, some symbols that may be another number in another batch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod

from torch import SymInt, Tensor

from ...specs.pipeline import Activation, Size, VariableSize


class SizeNames:
    """Names for the sizes that may differ: ``batch`` and ``sequence`` where they are the first of their kind."""

    def __init__(self, inputs: Iterable[tuple[str, Tensor]], ranges: Mapping[str, tuple[int, int | None]]) -> None:
        self.sizes: dict[str, VariableSize] = {}
        self._symbols: dict[str, str] = {}
        for input_name, tensor in inputs:
            for axis, size in enumerate(tensor.shape):
                symbols = sorted(map(str, size.node.expr.free_symbols)) if isinstance(size, SymInt) else []
                if len(symbols) == 1 and symbols[0] not in self._symbols:
                    name = self._usual(axis, tensor.dim()) or f"{input_name}_{axis}"
                    self._symbols[symbols[0]] = name
                    self.sizes[name] = VariableSize(name, example_size(size), *ranges.get(symbols[0], (0, None)))

    def activation(self, name: str, tensor: Tensor, *, requires_grad: bool) -> Activation:
        """Return a tensor of the export as it stands in the plan."""
        return Activation(
            name=name,
            shape=tuple(map(self.name, tensor.shape)),
            dtype=str(tensor.dtype).removeprefix("torch."),
            num_bytes=example_bytes(tensor),
            requires_grad=requires_grad,
        )

    def _usual(self, axis: int, num_axes: int) -> str | None:
        """Return the usual name of an input's axis: images have four axes, and no sequence."""
        name = {0: "batch", 1: "sequence"}.get(axis) if num_axes <= 3 else {0: "batch"}.get(axis)  # noqa: PLR2004
        return None if name in self.sizes else name

    def name(self, size: int | SymInt) -> Size:
        """Return a size as it is written: a number, a name, or a formula of names."""
        if isinstance(size, int) or size.node.expr.is_Integer:
            return size if isinstance(size, int) else int(size.node.expr)
        return re.sub(r"[A-Za-z_]\w*", lambda found: self._symbols.get(found[0], found[0]), str(size.node.expr))


def example_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor at the sizes of the example inputs."""
    return prod(map(example_size, tensor.shape)) * tensor.element_size()


def example_size(size: int | SymInt) -> int:
    """Return a size as it is in the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)
