"""Fused experts: tensors [experts, ...] of which each rank has some of the inner features."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from ....specs.dtypes import num_bytes
from ....specs.errors import Problem
from ..sayings import Options, Saying

if TYPE_CHECKING:
    from torch import nn

    from ....specs.param import ParamSpec
    from .declared import Declaration

_UP = {"colwise": -2, "packed_colwise": -2, "packed_rowwise": -1}
_DOWN = {"rowwise": -1, "colwise": -2}
"""Axis of the inner features, by style, of the tensors that make them and of the tensor that takes them."""

_FEW = 3
_ROW_BYTES = 16


@frozen
class Inner:
    """The inner features of experts: how wide the tensor is that takes them, and how their axes are split."""

    width: int
    uneven: bool

    def split(self, size: int, *, joined: bool) -> Options | None:
        """Return how an axis of ``size`` is split: once the inner features, or twice, gate and up."""
        uneven: Options = (("uneven", True),) if self.uneven else ()
        if size == self.width:
            return uneven
        if size != 2 * self.width:
            return None
        return (("blocks", (self.width, self.width)), *uneven) if joined else (("granule", 2), *uneven)


def split_fused(decl: Declaration, path: str) -> Iterator[Saying | Problem]:
    """Return the split of the tensors that a module holds itself, as its rules and their shapes say."""
    module = decl.module(path)
    own = {spec.path: spec for spec in decl.own(path) if spec.kind == "parameter"}
    styles = {p: decl.rules[p].style for p in own if p in decl.rules}
    down = next((p for p in own if _name(p).startswith(("down", "w2", "output")) and styles.get(p) in _DOWN), None)
    if down is None:
        cause = f"its plan splits none of its tensors as the one that takes the inner features: {styles or 'no rules'}"
        yield Problem(path, cause, "Declare its down projection rowwise, or split it with the verbs")
        return
    axis = _DOWN[styles[down]]
    width = own[down].orig_shape[axis]
    if problem := _unaligned(module, own[down], width, decl.num):
        yield problem
        return
    inner = Inner(width, uneven=bool(width % decl.num))
    joined = bool(getattr(module, "is_concatenated", True))
    yield Saying(down, "shard", (), (("axis", axis), *(inner.split(width, joined=joined) or ())))
    for tensor, spec in own.items():
        if tensor != down:
            yield _split_up(spec, styles.get(tensor), inner, joined=joined)


def _unaligned(module: nn.Module, spec: ParamSpec, width: int, num: int) -> Problem | None:
    """Return why a grouped matrix product cannot take the parts, if it cannot: its rows are multiples of 16 bytes."""
    part = -(-width // num)
    sizes = {part, width - part * (num - 1)}
    if getattr(getattr(module, "config", None), "_experts_implementation", None) != "grouped_mm":
        return None
    if all(size * num_bytes(spec.dtype) % _ROW_BYTES == 0 for size in sizes) or width * num_bytes(spec.dtype) % _ROW_BYTES:
        return None
    cause = (
        f"{num} ranks would have {' or '.join(map(str, sorted(sizes)))} of its {width} inner features, and rows of torch's"
        f" grouped matrix product are multiples of {_ROW_BYTES} bytes"
    )
    fits = [n for n in range(2, num) if width % n == 0 and width // n * num_bytes(spec.dtype) % _ROW_BYTES == 0]
    fewer = f"Split it over {max(fits)} ranks" if fits else "Leave it whole"
    return Problem(spec.path, cause, f"{fewer}, or build the model with experts_implementation='eager'", spec.type)


def _split_up(spec: ParamSpec, style: str | None, inner: Inner, *, joined: bool) -> Saying | Problem:
    is_bias = _name(spec.path).endswith("bias")
    if is_bias and _name(spec.path).startswith(("down", "w2", "output")):
        cause = "each rank would add this bias to its part of the sum, and it would be counted once a rank"
        return Problem(spec.path, cause, "Build the model without biases of experts, or leave its experts whole", spec.type)
    axis = -1 if is_bias else _UP.get(style or "")
    if axis is None or len(spec.orig_shape) < -axis:
        cause = f"it belongs to split experts, and its style {style!r} does not say how it is split"
        return Problem(spec.path, cause, f"The styles of such tensors are {', '.join(_UP)}", spec.type)
    split = inner.split(spec.orig_shape[axis], joined=joined)
    if split is None:
        cause = f"its axis of {spec.orig_shape[axis]} is neither the {inner.width} inner features nor twice as many"
        return Problem(spec.path, cause, "Split it with the verbs: .shard(axis=..., blocks=...)", spec.type)
    return Saying(spec.path, "shard", (), (("axis", axis), *split))


def sum_experts(decl: Declaration, path: str) -> Iterator[Saying]:
    """Return the sums around experts of which each rank has a part: of their output, and of their inputs' gradients."""
    for which in range(num_activations(decl.module(path))):
        options: Options = (("which", which),) if which else ()
        yield Saying(path, "sync", ("backward_post", "all_reduce"), options)
    yield Saying(path, "sync", ("forward_post", "all_reduce"))


def num_activations(module: nn.Module) -> int:
    """Return how many of the arguments of a module are activations, not the numbers of experts.

    >>> from torch import nn
    >>> num_activations(nn.Bilinear(2, 2, 2))
    2
    """
    named = (
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
        and not re.search(r"ind(ex|ices)|ids|idx|num_|mask", name)
    )
    return min(_FEW, sum(1 for _ in named))


def _name(path: str) -> str:
    return path.rpartition(".")[2]
