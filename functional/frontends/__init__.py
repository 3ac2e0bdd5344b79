"""Schedules from declarations that exist already, or from the model's graph. Names are loaded when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .graph.schedule import infer_schedule as infer_schedule
    from .logical_axes import schedule_from_rules as schedule_from_rules
    from .tp_plan.schedule import schedule_from_tp_plan as schedule_from_tp_plan

__all__ = ["infer_schedule", "schedule_from_rules", "schedule_from_tp_plan"]

_HOMES = {
    "infer_schedule": "graph.schedule",
    "schedule_from_rules": "logical_axes",
    "schedule_from_tp_plan": "tp_plan.schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
