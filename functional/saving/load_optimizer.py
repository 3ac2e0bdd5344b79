"""An optimizer gets back what it had noted, on whichever mesh it goes on."""

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
from ..checkpoints.optimizer_states import Group, SavedStates, saved_states, settings_for
from ..interpreter.interpret import interpret
from ..interpreter.torch_effects import TorchEffects
from ..interpreter.world import agree
from .gather import agreed
from .messages import messages_on
from .optimizer_states import give_states, groups_of


def load_optimizer(plan: Plan, model: Any, optimizer: Any, folder: str | Path) -> None:
    """Give an optimizer the states and settings that were saved; every rank of the mesh calls it.

    They are those that ``save_checkpoint`` wrote, or those of a universal checkpoint of DeepSpeed's, whose settings are not
    read. Each rank reads its own part of each state alone. The settings of its groups, such as the learning rate, are those
    that were saved, group by group.

    Args:
        plan: What was executed; its mesh may be another than that of the plan that was saved.
        model: What ``execute`` returned.
        optimizer: What it trains with: a torch optimizer, or DeepSpeed's with ZeRO 1 or 2.
        folder: What was saved.

    Raises:
        PlanError: In a single process, if the folder has no states, or those of another model or optimizer.
        ExecutionError: On every rank, with the first error of any rank.
    """
    held, here = agreed(plan, model)
    device = next((tensor.device for tensor in held.values()), torch.device("cpu"))
    found, error = _Found(plan, {}, ()), None
    try:
        found = states_plan(plan, folder, groups_of(held, optimizer))
    except Exception as wrong:  # noqa: BLE001  whatever is wrong here, the other ranks wait for the agreement
        error = wrong
    agree(plan, error, messages_on())
    loaded = interpret(found.plan, here, TorchEffects(here, device, nn.Module(), nn.Module(), {}))
    give_states(held, optimizer, _by_path(held, {**_numbers(found.numbers), **loaded}), found.settings)


@frozen
class _Found:
    """What is read of a folder.

    Args:
        plan: A plan whose tensors are the states, under their keys.
        numbers: States that lie in no tensor, by key.
        settings: Those of each group of the optimizer's, in their order.
    """

    plan: Plan
    numbers: Mapping[str, float]
    settings: tuple[Mapping[str, Any], ...]


def states_plan(plan: Plan, folder: str | Path, groups: Sequence[Group]) -> _Found:
    """Return how the states of a plan's tensors are read from a folder: as a plan, split as the tensors are.

    Args:
        plan: What was executed.
        folder: What was saved.
        groups: Those of the optimizer that gets the states, with those of their tensors that this rank holds.

    Raises:
        PlanError: If the folder has no states, or those of other tensors or of another optimizer.
    """
    saved = saved_states(str(folder))
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
    return _Found(found, saved.numbers, settings)


def _state(spec: ParamSpec, key: str, parts: tuple[Part, ...], shape: tuple[int, ...]) -> ParamSpec:
    """Return a state as a tensor of its own: split as the tensor that it is of, or a number."""
    shards = spec.shards if shape == spec.orig_shape else ()
    source = Loaded(parts)
    return evolve(spec, path=key, tie=(), dtype=source.dtype, orig_shape=shape, shards=shards, source=source)


def _missing(plan: Plan, saved: SavedStates) -> Iterator[Problem]:
    """Iterate over the tensors of which some states are there, and others that their neighbours have are not."""
    names: dict[str, set[str]] = {}
    for key in (*saved.tensors, *saved.numbers):
        name, _, path = key.partition("/")
        names.setdefault(path, set()).update({name} - {WEIGHTS})  # of which float32 tensors have no copy
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
    """Return the states of what a rank holds, by path and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in states.items():
        name, _, path = key.partition("/")
        if path in held:
            found.setdefault(path, {})[name] = tensor
    return found
