"""Call a copy of a whole model, or one of its methods, to find out whether it runs with some inputs, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model.copy import copy_module
from ..model.known_values import KnownValues
from ..model.rng_state import own_generators
from .local_model import fake_inputs, following, quiet

_WIDTH = 0.2


class TrialRun:
    """A copy of a model that can be called, with random values or on fake tensors.

    Args:
        model: The model; it is not changed.
        with_values: Whether its tensors have values.
    """

    def __init__(self, model: nn.Module, *, with_values: bool) -> None:
        self._mode: FakeTensorMode | None = None
        if not with_values:
            self._mode = mode = FakeTensorMode(allow_non_fake_inputs=True)

            def tensor_of(tensor: Tensor) -> Tensor:
                with mode:
                    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        else:
            generator = torch.Generator().manual_seed(0)

            def tensor_of(tensor: Tensor) -> Tensor:
                if tensor.device.type != "meta":
                    return tensor.detach().cpu().clone()
                if not tensor.is_floating_point():
                    return torch.zeros(tensor.shape, dtype=tensor.dtype)
                return _WIDTH * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

        self._model = copy_module(model, tensor_of, for_planning=True).eval()

    def __call__(self, inputs: Mapping[str, Any], method: str = "forward") -> Any:
        """Return what the model, or a method of it, returns."""
        call = self._model if method == "forward" else attrgetter(method)(self._model)
        if self._mode is None:
            with torch.no_grad(), own_generators(0), quiet():
                return call(**inputs)
        with following(self._mode, values := KnownValues()), torch.no_grad():
            return call(**fake_inputs(inputs, values))
