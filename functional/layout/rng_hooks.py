"""Random numbers that differ along ``tensor`` within a module, and stay the same along it outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._guards import detect_fake_mode

from ..model.rng_state import derive_seed

if TYPE_CHECKING:
    from torch import nn


class OwnRng:
    """Hooks around a module: torch's own generators are seeded anew for it, and set back after it.

    The seed follows from one number that the CPU's generator draws at each call, the same on all ranks, and from the rank's
    place along ``tensor``. What a checkpointed region draws when it is computed again is therefore what it drew before.

    Args:
        index: Place of the rank along ``tensor``.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._outside: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave the generators of outside."""
        if _is_followed():
            return
        common = int(torch.randint(2**62, ()))
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._outside.append((torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None))
        torch.manual_seed(derive_seed(common, f"tensor {self._index}"))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Come back to the generators of outside, also after an error."""
        if _is_followed() or not self._outside:
            return
        cpu, gpu = self._outside.pop()
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


def _is_followed() -> bool:
    """Whether the module runs on fake tensors, so that no number is drawn."""
    return detect_fake_mode() is not None
