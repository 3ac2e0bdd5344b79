"""Which optimizer the target's configuration names, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ....specs.plan import Plan

_KNOWN = ("Adam", "AdamW", "SGD")
STEP_BYTES = 4
"""Bytes of the number of steps that ``torch.optim.Adam`` keeps for each tensor: one float32."""


def optimizer_of(plan: Plan) -> str | None:
    """Return the optimizer that the target's configuration names: ``Adam``, ``AdamW`` or ``SGD``.

    None if it names none, or one whose states are not known here. DeepSpeed does not tell its own names' case (config.py of
    DeepSpeed 0.19.8).

    >>> from shardplan.specs import Mesh, Plan, SpecTree
    >>> optimizer_of(Plan(Mesh(), SpecTree(), (), target="deepspeed", config={"optimizer": {"type": "adamw"}}))
    'AdamW'
    """
    name = _section(plan).get("type")
    if not isinstance(name, str):
        return None
    if plan.target == "deepspeed":
        return {"adam": "Adam", "adamw": "AdamW"}.get(name.lower(), name if name in _KNOWN else None)
    return name if name in _KNOWN else None


def num_states(plan: Plan) -> int:
    """Return how many tensors the optimizer keeps for each one that it works on, of its size and dtype."""
    params = _params(plan)
    match optimizer_of(plan):
        case "Adam" | "AdamW":
            return 3 if params.get("amsgrad") else 2
        case "SGD":
            return 1 if params.get("momentum") else 0
        case _:
            return 0


def step_bytes(plan: Plan) -> int:
    """Return the bytes that the optimizer keeps for each tensor besides: torch's Adam counts steps in a tensor.

    DeepSpeed's own FusedAdam (ops/adam/fused_adam.py of 0.19.8), which a configuration gets unless it says ``torch_adam``,
    counts them in Python.
    """
    is_adam = optimizer_of(plan) in ("Adam", "AdamW")
    is_fused = plan.target == "deepspeed" and not _params(plan).get("torch_adam")
    return STEP_BYTES if is_adam and not is_fused else 0


def _section(plan: Plan) -> Mapping[str, Any]:
    section = (plan.config or {}).get("optimizer")
    return section if isinstance(section, Mapping) else {}


def _params(plan: Plan) -> Mapping[str, Any]:
    params = _section(plan).get("params")
    return params if isinstance(params, Mapping) else {}
