"""Schedules from declarations or a model's graph, and small models to try them on. Names are loaded when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .graph.schedule import infer_schedule as infer_schedule
    from .logical_axes import schedule_from_rules as schedule_from_rules
    from .model_inputs import made_inputs as made_inputs
    from .shrink.shrink import shrink_config as shrink_config
    from .tp_plan.schedule import schedule_from_tp_plan as schedule_from_tp_plan

__all__ = ["infer_schedule", "made_inputs", "schedule_from_rules", "schedule_from_tp_plan", "shrink_config"]

_HOMES = {
    "infer_schedule": "graph.schedule",
    "made_inputs": "model_inputs",
    "schedule_from_rules": "logical_axes",
    "schedule_from_tp_plan": "tp_plan.schedule",
    "shrink_config": "shrink.shrink",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
