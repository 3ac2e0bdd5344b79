"""Fused experts: tensors [experts, ...] whose inner features are split."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from ....specs.dtypes import num_bytes
from ....specs.errors import Problem
from ....specs.paths import name_of
from ....specs.verb_call import Options, VerbCall

if TYPE_CHECKING:
    from torch import nn

    from ....specs.param import ParamSpec
    from .declared import DeclaredPlan

_UP = {"colwise": -2, "packed_colwise": -2, "packed_rowwise": -1}
_DOWN = {"rowwise": -1, "colwise": -2}
"""Axis of the inner features, by style, of the tensors that make them and of the tensor that takes them."""

_FEW = 3
_ROW_BYTES = 16


@frozen
class Inner:
    """The inner features of experts.

    Args:
        width: How many there are.
        granule: How many stay together, so that rows of a part are as long as a grouped matrix product takes them.
        uneven: Whether parts differ.
    """

    width: int
    granule: int
    uneven: bool

    def split(self, size: int, *, joined: bool) -> Options | None:
        """Return how an axis of ``size`` is split: once the inner features, or twice, gate and up."""
        twice = size == 2 * self.width
        if not twice and size != self.width:
            return None
        granule = self.granule if joined or not twice else 2 * self.granule
        blocks: Options = (("blocks", (self.width, self.width)),) if joined and twice else ()
        return (*blocks, *((("granule", granule),) if granule > 1 else ()), *((("uneven", True),) if self.uneven else ()))


def split_fused(decl: DeclaredPlan, path: str) -> Iterator[VerbCall | Problem]:
    """Split the tensors that a module holds itself, as its rules and their shapes say."""
    module = decl.module(path)
    own = {spec.path: spec for spec in decl.own(path) if spec.kind == "parameter"}
    styles = {p: decl.rules[p].style for p in own if p in decl.rules}
    down = next((p for p in own if name_of(p).startswith(("down", "w2", "output")) and styles.get(p) in _DOWN), None)
    if down is None:
        cause = f"its plan splits none of its tensors as the one that takes the inner features: {styles or 'no rules'}"
        yield Problem(path, cause, "Declare its down projection rowwise, or split it with the verbs")
        return
    axis = _DOWN[styles[down]]
    width = own[down].orig_shape[axis]
    granule = _granule(module, own[down], width, decl.num)
    inner = Inner(width, granule, uneven=bool(width // granule % decl.num))
    if problem := _idle(own[down], inner, decl.num):
        yield problem
        return
    joined = bool(getattr(module, "is_concatenated", True))
    yield VerbCall(down, "shard", (), (("axis", axis), *(inner.split(width, joined=joined) or ())))
    for tensor, spec in own.items():
        if tensor != down:
            yield _split_up(spec, styles.get(tensor), inner, joined=joined)


def _granule(module: nn.Module, spec: ParamSpec, width: int, num: int) -> int:
    """Return how many inner features stay together: rows that torch's grouped matrix product takes are of 16 bytes each."""
    row = max(1, _ROW_BYTES // num_bytes(spec.dtype))
    is_grouped = getattr(getattr(module, "config", None), "_experts_implementation", None) == "grouped_mm"
    is_aligned = width % num == 0 and width // num % row == 0
    return row if is_grouped and width % row == 0 and not is_aligned else 1


def _idle(spec: ParamSpec, inner: Inner, num: int) -> Problem | None:
    """Return a problem if some ranks would have none of the inner features."""
    count = inner.width // inner.granule
    if not inner.uneven or -(-count // -(-count // num)) == num:
        return None
    why = f", of which {inner.granule} stay together for torch's grouped matrix product" if inner.granule > 1 else ""
    cause = f"it has {inner.width} inner features{why}, and some of {num} ranks would have none"
    fits = [n for n in range(2, num) if -(-count // -(-count // n)) == n]
    return Problem(spec.path, cause, f"Split it over {max(fits)} ranks" if fits else "Leave it whole", spec.type)


def _split_up(spec: ParamSpec, style: str | None, inner: Inner, *, joined: bool) -> VerbCall | Problem:
    is_bias = name_of(spec.path).endswith("bias")
    if is_bias and name_of(spec.path).startswith(("down", "w2", "output")):
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
    return VerbCall(spec.path, "shard", (), (("axis", axis), *split))


def sum_experts(decl: DeclaredPlan, path: str) -> Iterator[VerbCall]:
    """Sum the outputs of split experts, and the gradients of their inputs."""
    for which in range(num_activations(decl.module(path))):
        options: Options = (("which", which),) if which else ()
        yield VerbCall(path, "sync", ("backward_post", "all_reduce"), options)
    yield VerbCall(path, "sync", ("forward_post", "all_reduce"))


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
