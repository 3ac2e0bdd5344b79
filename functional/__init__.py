"""How it is done: pure functions from records to records, then one interpreter.

Names are loaded when they are first asked for, so that ``audit`` and ``predict`` do without torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit import audit as audit
    from .auditing.html.report import html_report as html_report
    from .auditing.nearest_meshes import nearest_meshes as nearest_meshes
    from .build import build as build
    from .build import consolidate_model as consolidate_model
    from .build import init_target_engine as init_target_engine
    from .built import Built as Built
    from .diff import diff as diff
    from .execute import execute as execute
    from .goldens import assert_plan_matches as assert_plan_matches
    from .guards.error import TrainingError as TrainingError
    from .interpreter.dry_run import DryRun as DryRun
    from .interpreter.dry_run import predict as predict
    from .interpreter.resolve import resolve as resolve
    from .interpreter.world import ExecutionError as ExecutionError
    from .layout.device_mesh import from_device_mesh as from_device_mesh
    from .layout.device_mesh import to_device_mesh as to_device_mesh
    from .pipeline.build_stages import stage_modules as stage_modules
    from .plan import plan_build as plan_build
    from .planning.dtensor_steps import as_dtensors as as_dtensors
    from .planning.from_shards import from_shards as from_shards
    from .planning.reshard import reshard as reshard
    from .saving.gather import gather as gather
    from .saving.load_optimizer import load_optimizer as load_optimizer
    from .saving.materialize import materialize as materialize
    from .saving.save_checkpoint import save_checkpoint as save_checkpoint
    from .saving.transfer import transfer as transfer
    from .schedule import Schedule as Schedule
    from .schedule import create_schedule as create_schedule
    from .search import search as search
    from .verify import verify as verify

__all__ = [
    "Built",
    "DryRun",
    "ExecutionError",
    "Schedule",
    "TrainingError",
    "as_dtensors",
    "assert_plan_matches",
    "audit",
    "build",
    "consolidate_model",
    "create_schedule",
    "diff",
    "execute",
    "from_device_mesh",
    "from_shards",
    "gather",
    "html_report",
    "init_target_engine",
    "load_optimizer",
    "materialize",
    "nearest_meshes",
    "plan_build",
    "predict",
    "reshard",
    "resolve",
    "save_checkpoint",
    "search",
    "stage_modules",
    "to_device_mesh",
    "transfer",
    "verify",
]

_HOMES = {
    "Built": "built",
    "DryRun": "interpreter.dry_run",
    "ExecutionError": "interpreter.world",
    "Schedule": "schedule",
    "TrainingError": "guards.error",
    "as_dtensors": "planning.dtensor_steps",
    "assert_plan_matches": "goldens",
    "audit": "audit",
    "build": "build",
    "consolidate_model": "build",
    "create_schedule": "schedule",
    "diff": "diff",
    "execute": "execute",
    "from_device_mesh": "layout.device_mesh",
    "from_shards": "planning.from_shards",
    "gather": "saving.gather",
    "html_report": "auditing.html.report",
    "init_target_engine": "build",
    "load_optimizer": "saving.load_optimizer",
    "materialize": "saving.materialize",
    "nearest_meshes": "auditing.nearest_meshes",
    "plan_build": "plan",
    "predict": "interpreter.dry_run",
    "reshard": "planning.reshard",
    "resolve": "interpreter.resolve",
    "save_checkpoint": "saving.save_checkpoint",
    "search": "search",
    "stage_modules": "pipeline.build_stages",
    "to_device_mesh": "layout.device_mesh",
    "transfer": "saving.transfer",
    "verify": "verify",
}


class _Names(ModuleType):
    """A package whose functions are not hidden by the files of the same name (``execute`` in ``execute.py``)."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # the import system puts every submodule on its package
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Names
