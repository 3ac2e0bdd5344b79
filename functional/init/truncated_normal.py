"""Truncated normals as torch makes them: by drawing again what falls outside.

That is a loop that depends on data, so that fake tensors cannot follow it; what it comes to is known, from its arguments.
Code of others that looks at what it has drawn is left alone: nobody knows what it would do then.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.nn import init

from ...specs.program import TruncatedNormal

if TYPE_CHECKING:
    from torch import Tensor

_CODE = getattr(getattr(init, "_no_grad_trunc_normal_", None), "__code__", None)


def truncated_by_torch() -> tuple[Tensor, TruncatedNormal] | None:
    """Return what ``torch.nn.init.trunc_normal_`` is asked for, and the tensor, if it is what is running now."""
    frame = sys._getframe()  # noqa: SLF001  nothing else tells who asks
    while frame is not None:
        if frame.f_code is _CODE:
            given: dict[str, Any] = frame.f_locals
            try:
                return given["tensor"], TruncatedNormal(given["mean"], given["std"], given["a"], given["b"])
            except ValueError:  # an interval without an end, or that holds nothing
                return None
        frame = frame.f_back
    return None
