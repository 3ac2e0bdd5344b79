"""Facts about training that are the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

STEP_BYTES = 4
"""Bytes of the step counter that ``torch.optim.Adam`` keeps for each tensor: one float32."""


@frozen
class Optimizer:
    """An optimizer whose states are known.

    Args:
        name: Its class in ``torch.optim``.
        num_states: Tensors that it keeps for each parameter, of the parameter's size and dtype.
        step_bytes: Bytes that it keeps for each parameter besides.
    """

    name: str
    num_states: int
    step_bytes: int = 0

    def state_bytes(self, num_bytes: int, num_tensors: int) -> int:
        """Return the bytes of the states for a number of parameters, given the bytes of them all."""
        return self.num_states * num_bytes + self.step_bytes * num_tensors


UNKNOWN = Optimizer("unknown", num_states=0)
"""Stands for an optimizer whose states are not counted."""


@frozen
class Training:
    """How a runtime trains, by a plan's configuration.

    Args:
        num_microbatches: Micro-batches of a step on a rank.
        optimizer: The optimizer that the configuration names; None without a name, or if its states are not known.
        cast_to: Dtype to which floating-point parameters are cast; None if they are left as they are.
        without_gradient: How the runtime treats a trained parameter that no gradient reaches.
        uneven_state: Why ranks that hold the same tensors keep different state; empty if they keep the same.
        own_copies: Why values written into the model after it was wrapped are lost; empty if they are used.
    """

    num_microbatches: int = 1
    optimizer: Optimizer | None = None
    cast_to: str | None = None
    without_gradient: str = "the optimizer is given it all the same, and passes over it"
    uneven_state: str = ""
    own_copies: str = ""


def named_optimizer(config: Mapping[str, Any] | None) -> Optimizer | None:
    """Return the optimizer of ``torch.optim`` that a configuration names in its section ``optimizer``.

    >>> named_optimizer({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}})
    Optimizer(name='SGD', num_states=1, step_bytes=0)
    """
    section = mapping((config or {}).get("optimizer"))
    params = mapping(section.get("params"))
    match section.get("type"):
        case "Adam" | "AdamW" as name:
            return Optimizer(name, 3 if params.get("amsgrad") else 2, STEP_BYTES)
        case "SGD":
            return Optimizer("SGD", 1 if params.get("momentum") else 0)
        case _:
            return None


def mapping(section: Any) -> Mapping[str, Any]:
    """Return a section of a configuration, empty where something else stands in its place."""
    return section if isinstance(section, Mapping) else {}
