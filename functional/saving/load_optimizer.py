"""Load saved states into an optimizer, on any mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from ...specs.errors import PlanError, Problem
from ...specs.param import ParamSpec
from ...specs.plan import Plan
from ...specs.source import Loaded
from ...specs.steps import Agree, CheckLoaded, LoadShard
from ...specs.stored import Part
from ...specs.tree import SpecTree
from ..checkpoints.assembly import Assembly
from ..checkpoints.formats.universal import WEIGHTS
from ..checkpoints.optimizer_states import ParamGroup, StoredStates, settings_for, stored_states
from ..interpreter.interpret import interpret
from ..interpreter.torch_effects import TorchEffects
from .gather import agreed
from .messages import agreement
from .optimizer_states import give_states, groups_of


def load_optimizer(plan: Plan, model: Any, optimizer: Any, folder: str | Path) -> None:
    """Give an optimizer the states and settings that were saved; every rank of the mesh calls it.

    The folder was written by ``save_checkpoint``, or is a universal checkpoint of DeepSpeed's, whose settings are not read.
    Each rank reads only its own part of each state. The settings of the optimizer's groups, such as the learning rate, are
    restored group by group.

    Args:
        plan: The executed plan; its mesh may differ from the mesh of the saved plan.
        model: The model that ``execute`` returned.
        optimizer: The model's optimizer: a torch optimizer, or DeepSpeed's with ZeRO 1 or 2.
        folder: The saved folder.

    Raises:
        PlanError: In a single process, if the folder has no states, or states of another model or optimizer.
        ExecutionError: On every rank, with the first error of any rank.
    """
    held, here = agreed(plan, model)
    device = next((tensor.device for tensor in held.values()), torch.device("cpu"))
    found = _StatesToLoad(plan, {}, ())
    with agreement(plan):
        found = states_plan(plan, folder, groups_of(plan, held, optimizer))
    loaded = interpret(found.plan, here, TorchEffects(here, device, nn.Module(), nn.Module(), {}))
    give_states(plan, held, optimizer, _by_path(held, {**_numbers(found.numbers), **loaded}), found.settings)


@frozen
class _StatesToLoad:
    """The states to load from a folder.

    Args:
        plan: A plan whose tensors are the states, under their keys.
        numbers: States that are plain numbers, by key.
        settings: Settings of each of the optimizer's groups, in order.
    """

    plan: Plan
    numbers: Mapping[str, float]
    settings: tuple[Mapping[str, Any], ...]


def states_plan(plan: Plan, folder: str | Path, groups: Sequence[ParamGroup]) -> _StatesToLoad:
    """Plan how states are read from a folder: each is split as its tensor is.

    Raises:
        PlanError: If the folder has no states, or states of other tensors or of another optimizer.
    """
    saved = stored_states(str(folder))
    settings, problems = settings_for(saved.groups, groups)
    problems += _missing(plan, saved)
    specs: list[ParamSpec] = []
    for key, parts in saved.tensors.items():
        spec, shape = plan.tree.get(key.partition("/")[2]), Assembly.of(parts).shape
        if spec is None or not spec.requires_grad:
            cause = f"{parts[0].stored.file} has a state of it, and the plan trains no such tensor"
            problems.append(Problem(key, cause, "Plan the model that was trained"))
        elif shape not in (spec.orig_shape, ()):
            cause = f"in {parts[0].stored.file} it is {list(shape)}, and its tensor {list(spec.orig_shape)}"
            problems.append(Problem(key, cause, "Plan the model that was trained", spec.type))
        else:
            specs.append(_state(spec, key, parts, shape))
    if problems:
        raise PlanError(problems)
    steps = [
        Agree("opening"),
        *(
            LoadShard(place, tuple(spec.path for spec in mine), dtype)
            for dtype in sorted({spec.dtype for spec in specs})
            for place in range(plan.mesh.pipe)
            if (mine := [spec for spec in specs if spec.dtype == dtype and place in spec.places(plan.mesh)])
        ),
        CheckLoaded(),
        Agree("closing"),
    ]
    found = Plan(plan.mesh, SpecTree(specs), steps, pipeline=plan.pipeline, folder=saved.folder)
    return _StatesToLoad(found, saved.numbers, settings)


def _state(spec: ParamSpec, key: str, parts: tuple[Part, ...], shape: tuple[int, ...]) -> ParamSpec:
    """Return the spec of a state: split as its tensor is, or a number without axes."""
    shards = spec.shards if shape == spec.orig_shape else ()
    source = Loaded(parts)
    return evolve(spec, path=key, tie=(), dtype=source.dtype, orig_shape=shape, shards=shards, source=source)


def _missing(plan: Plan, saved: StoredStates) -> Iterator[Problem]:
    """Iterate over problems with tensors that lack states which other tensors of their group have."""
    names: dict[str, set[str]] = {}
    for key in (*saved.tensors, *saved.numbers):
        name, _, path = key.partition("/")
        names.setdefault(path, set()).update({name} - {WEIGHTS})  # float32 tensors have no such copy
    trained = [spec.path for spec in plan.tree.values() if spec.requires_grad and spec.kind == "parameter"]
    together = [group.paths for group in saved.groups] if saved.groups is not None else [tuple(trained)]
    for paths in together:
        every = set[str]().union(*(names.get(path, set()) for path in paths))
        for path in paths:
            lacks = every - names.get(path, set())
            if lacks and (path in names or saved.groups is None):
                cause = f"of its states {', '.join(sorted(lacks))} {'is' if len(lacks) == 1 else 'are'} not there"
                yield Problem(path, cause, "Save again, or take a copy that is whole")


def _numbers(numbers: Mapping[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(float(number)) for key, number in numbers.items()}


def _by_path(held: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the states of the tensors that this rank holds, by path and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in states.items():
        name, _, path = key.partition("/")
        if path in held:
            found.setdefault(path, {})[name] = tensor
    return found
