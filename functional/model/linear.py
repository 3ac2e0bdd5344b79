"""Linear modules and the axes of their weight: ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn


@frozen
class LinearLayout:
    """How a linear module keeps its weight.

    Args:
        out_axis: Axis of the weight along which the output features lie.
        in_axis: Axis along which the input features lie.
        out_features: Attribute that holds the number of output features.
        in_features: Attribute that holds the number of input features.
    """

    out_axis: int
    in_axis: int
    out_features: str
    in_features: str


_LINEAR = LinearLayout(out_axis=0, in_axis=1, out_features="out_features", in_features="in_features")
_CONV1D = LinearLayout(out_axis=1, in_axis=0, out_features="nf", in_features="nx")


def linear_of(module: nn.Module) -> LinearLayout | None:
    """Return how a linear module keeps its weight, None for any other module.

    >>> linear_of(nn.Linear(4, 8)).out_axis, linear_of(nn.LayerNorm(4))
    (0, None)
    """
    if isinstance(module, nn.Linear):
        return _LINEAR
    return _CONV1D if _is_conv1d(type(module)) else None


def overrides_forward(module: nn.Module) -> bool:
    """Tell whether a linear module overrides the forward of its class, so that its bias cannot be taken out."""
    return type(module).forward is not nn.Linear.forward and not _is_conv1d(type(module), exactly=True)


def forward_without_bias(module: Any, *given: Tensor, **named: Tensor) -> Tensor:
    """Return the output of a linear module without its bias. Its input may be given by name."""
    (x,) = (*given, *named.values())
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, module.weight)
    return torch.mm(x.view(-1, x.shape[-1]), module.weight).view(*x.shape[:-1], -1)  # as Conv1D's own code, call by call


def _is_conv1d(cls: type, *, exactly: bool = False) -> bool:
    """Tell whether a class is transformers' ``Conv1D``, without importing transformers: whoever uses it has imported it."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and (cls is conv1d if exactly else issubclass(cls, conv1d))
