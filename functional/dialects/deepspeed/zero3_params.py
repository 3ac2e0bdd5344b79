"""Parameters that ZeRO 3 keeps in pieces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def is_in_pieces(tensor: Tensor | None) -> bool:
    """Tell whether a tensor is a parameter that ZeRO 3 keeps in pieces along ``data``."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor; of a parameter in pieces the shape when it is whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def gathered(tensor: Tensor | None) -> AbstractContextManager[Any]:
    """Gather a parameter in pieces for the duration of the block; all ranks along ``data`` enter it."""
    if not is_in_pieces(tensor):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
