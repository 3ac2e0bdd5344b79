"""Make schedules from a function of the user's, or from the configuration of a transformers model."""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from ...specs import errors
from ...specs.errors import PlanError, Problem
from ...specs.mesh import Mesh
from ..frontends.graph.inputs import inferred_inputs
from ..frontends.graph.schedule import infer_schedule
from ..frontends.shrink.shrink import shrink_config
from ..frontends.tp_plan.declared import names_no_layer
from ..frontends.tp_plan.schedule import schedule_from_tp_plan
from ..frontends.transformers_models import model_classes
from ..model.input_candidates import with_no_cache
from ..schedule import Schedule, create_schedule

if TYPE_CHECKING:
    from torch import nn

    from ...specs.param import ParamSpec


_PACKAGES = (str(Path(__file__).parent.parent), str(Path(errors.__file__).parent))
"""Folders of this package's own code, which are skipped when an error is traced to the user's line."""


@frozen
class ScheduleSource:
    """A way to make schedules for any mesh, and the sizes of the model's example inputs.

    Args:
        schedule: Makes the schedule for a mesh.
        batch: Batch size of the example inputs; None if there are none.
        sequence: Their length in tokens; None if there are none, or they have no length.
    """

    schedule: Callable[[Mesh], Schedule]
    batch: int | None = None
    sequence: int | None = None

    def example_inputs(self, sch: Schedule) -> Mapping[str, Any] | None:
        """Return meta tensors by the names of the model's arguments; None if their sizes are not given.

        Raises:
            PlanError: If a size is missing, or the model's arguments cannot be inferred.
        """
        if self.batch is None and self.sequence is None:
            return None
        return _inputs(sch.runtime.model, self.batch, self.sequence)


def from_factory(name: str, batch: int | None, sequence: int | None, *, small: bool = False) -> ScheduleSource:
    """Make schedules by calling the user's function ``module:function``, which takes a mesh and returns a schedule.

    Args:
        name: The function.
        batch: Batch size of the example inputs.
        sequence: Their length.
        small: Whether it is asked for a small model: ``function(mesh, small=True)``.

    Raises:
        PlanError: If there is no such function, or it raises; the error names the line of the user's code.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as python -m does
    factory = _imported(name)
    options = {"small": True} if small else {}
    if small and "small" not in inspect.signature(factory).parameters:
        cause = f"it takes {inspect.signature(factory)}, and --shrink asks it for a small model"
        fix = "Let it take (mesh, small=False), and make a small model where that is True; or leave --shrink out"
        raise PlanError([Problem(name, cause, fix)])

    def schedule(mesh: Mesh) -> Schedule:
        made = _run(name, lambda: factory(mesh, **options))
        if not isinstance(made, Schedule):
            cause = f"it returns a {type(made).__name__}, not a schedule"
            raise PlanError([Problem(name, cause, "return create_schedule(model, mesh).at[...]...")])
        return made

    return ScheduleSource(schedule, batch, sequence)


def from_config(path: Path, batch: int | None, sequence: int | None, *, small: bool = False) -> ScheduleSource:
    """Make schedules from the configuration of a transformers model, in a folder or a file; nothing is downloaded.

    The model is split as it declares, else as its computation allows, and cut evenly along ``pipe``.

    Args:
        path: The folder or file.
        batch: Batch size of the example inputs.
        sequence: Their length.
        small: Whether the configuration is made small, with the same structure.

    Raises:
        PlanError: If there is no configuration, or no model for it.
    """
    config = _config(path)
    whole = None if small else _model(path, config)

    def schedule(mesh: Mesh) -> Schedule:
        model = _model(path, shrink_config(config, mesh)) if whole is None else whole
        declared = getattr(model, "_tp_plan", None)
        sch = create_schedule(model, mesh)
        if declared and not names_no_layer(sch, declared):
            sch = _with_origin(schedule_from_tp_plan(model, mesh), f"_tp_plan of {path}")
        elif mesh.tensor > 1:
            sch = _with_origin(infer_schedule(model, mesh), f"inferred from {path}")
        return sch.cut_evenly(mesh.pipe) if mesh.pipe > 1 else sch

    return ScheduleSource(schedule, batch, sequence)


def read_config(file: Path | None) -> dict[str, Any] | None:
    """Read the configuration of a target from a JSON file; None for no file.

    Raises:
        PlanError: If the file is missing, or holds no JSON object.
    """
    if file is None:
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError([Problem(str(file), f"it cannot be read: {error}", "Give a JSON file")]) from None
    if not isinstance(config, dict):
        cause = f"it holds a JSON {type(config).__name__}, not an object"
        raise PlanError([Problem(str(file), cause, '{"train_batch_size": 8, ...}')])
    return config


def _imported(name: str) -> Callable[..., object]:
    module_name, _, function = name.partition(":")
    if not module_name or not function or module_name.endswith(".py"):
        stem = module_name.removesuffix(".py").replace("/", ".") or "train"
        raise PlanError([Problem(name, "it is not module:function", f"Write {stem}:{function or 'schedule'}")])
    try:
        module = _run(name, lambda: import_module(module_name))
    except ModuleNotFoundError as error:
        cause = f"there is no module {error.name!r}, in {Path.cwd()} or installed"
        raise PlanError([Problem(name, cause, "Go to the folder that it is in")]) from None
    found = getattr(module, function, None)
    if not callable(found):
        names = ", ".join(sorted(n for n, value in vars(module).items() if inspect.isfunction(value))) or "none"
        raise PlanError([Problem(name, f"{module_name} has no function {function!r}", f"Its functions are {names}")])
    return found


def _run(name: str, call: Callable[[], Any]) -> Any:
    """Call the user's code; its errors become problems with their line, and its prints go to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            return call()
    except PlanError:
        raise
    except ModuleNotFoundError as error:
        if error.name == name.partition(":")[0]:
            raise  # the module itself is missing, not a module that it imports
        raise PlanError([_raised(name, error)]) from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and must not end the command
        raise PlanError([_raised(name, error)]) from error


def _raised(name: str, error: Exception | SystemExit) -> Problem:
    """Return the problem of an error, with the innermost line outside of this package and of installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(("<", sys.base_prefix))]
    own = [f for f in own if not f.filename.startswith(_PACKAGES)]
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else "it"
    return Problem(name, f"{where} raised {type(error).__name__}: {error}")


def _config(path: Path) -> Any:
    """Read the configuration of a transformers model."""
    from transformers import AutoConfig

    if not path.exists():
        raise PlanError([Problem(str(path), "there is no such folder or file", "Give a folder with config.json, or that")])
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise PlanError([Problem(str(path), f"it holds no configuration of a transformers model: {error}")]) from error


def _model(path: Path, config: Any) -> nn.Module:
    """Build the model of a configuration on the meta device, in the configuration's dtype."""
    causes: list[str] = []
    for cls in model_classes(config):
        try:
            with torch.device("meta"):
                built: Any = cls
                return built._from_config(config)  # noqa: SLF001  AutoModel calls it: it heeds the config's dtype
        except Exception as error:  # noqa: BLE001  a constructor may raise anything; the next class is tried
            causes.append(f"{cls.__name__} raises {type(error).__name__}: {error}")
    cause = "; ".join(causes) or "transformers has no model for it"
    raise PlanError([Problem(str(path), cause, "Build the model in a function: --factory module:function")])


def _with_origin(sch: Schedule, where: str) -> Schedule:
    """Record ``where`` as the origin of every split, in place of a line of the user's code."""

    def named(spec: ParamSpec) -> ParamSpec:
        return evolve(spec, origin=evolve(spec.origin, where=where)) if spec.origin else spec

    return evolve(sch, tree=sch.tree.map(named))


def _inputs(model: nn.Module, batch: int | None, sequence: int | None) -> dict[str, Any]:
    """Return a model's example inputs as meta tensors of the given sizes."""
    if batch is None:
        raise PlanError([Problem("--batch", "it is not given, and --sequence is", "Give both")])
    if hasattr(model, "main_input_name"):
        inputs = inferred_inputs(model)
    elif "input_ids" in inspect.signature(model.forward).parameters:
        inputs = with_no_cache(model, {"input_ids": torch.zeros(1, 1, dtype=torch.long, device="meta")})
    else:
        takes = ", ".join(inspect.signature(model.forward).parameters)
        cause = f"what this {type(model).__name__} is called with cannot be told: its forward takes ({takes})"
        raise PlanError(
            [Problem("--batch", cause, "Call the tokens input_ids, or plan in Python: plan_build(schedule, ...)")]
        )
    return {name: _sized(name, value, batch, sequence) for name, value in inputs.items()}


def _sized(name: str, value: Any, batch: int, sequence: int | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.empty((batch, *value.shape[1:]), dtype=value.dtype, device="meta")
    if sequence is None:
        raise PlanError([Problem("--sequence", f"it is not given, and {name} has a length", "Give --batch and --sequence")])
    return torch.empty((batch, sequence), dtype=value.dtype, device="meta")
