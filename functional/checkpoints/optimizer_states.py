"""Optimizer states stored in a folder that ``save_checkpoint`` or DeepSpeed wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from frozendict import frozendict

from ...specs.errors import PlanError, Problem
from ...specs.stored import Folder, Part
from .formats.hugging_face import read_files
from .formats.manifest import read_manifest
from .formats.universal import WEIGHTS, ZERO, read, read_states

STATES_FILE = "optimizer.safetensors"
"""The file of optimizer states, beside the weights."""

_SAVE = "Save it with the optimizer: save_checkpoint(plan, model, folder, optimizer=optimizer)"


@frozen
class ParamGroup:
    """A parameter group of an optimizer.

    Args:
        settings: Plain values such as ``lr``, by name.
        paths: Paths of the tensors that the group trains.
    """

    settings: Mapping[str, Any]
    paths: tuple[str, ...]


@frozen
class StoredStates:
    """Stored optimizer states, by ``name/path``.

    Args:
        folder: The files.
        tensors: Parts of each state that is a tensor.
        numbers: States that are plain numbers.
        groups: The optimizer's groups; None if the folder does not have them.
    """

    folder: Folder
    tensors: Mapping[str, tuple[Part, ...]]
    numbers: Mapping[str, float]
    groups: tuple[ParamGroup, ...] | None


def stored_states(folder: str) -> StoredStates:
    """List the optimizer states in a folder that ``save_checkpoint`` wrote, or in a universal checkpoint.

    The float32 weights of a universal checkpoint count as states: DeepSpeed keeps them beside weights of fewer bits.

    Raises:
        PlanError: If the folder has no states, or they are damaged.
    """
    if (Path(folder) / ZERO).is_dir():
        states, weights = read_states(folder), read(folder)
        named = {WEIGHTS: weights.tensors, **states.tensors}
        files = dict.fromkeys((*states.folder.files, *weights.folder.files))
        return StoredStates(Folder(folder, tuple(files)), _by_key(named), _by_key(states.numbers), None)
    manifest = read_manifest(folder)
    if manifest is None or manifest.training is None or STATES_FILE not in manifest.files:
        raise PlanError([_no_states(folder)])
    groups = _groups(folder, manifest.training)
    files, held, problems = read_files(folder, [STATES_FILE], manifest)
    if problems:
        raise PlanError(problems)
    tensors = {key: (Part.whole(stored),) for key, stored in held[STATES_FILE].items()}
    return StoredStates(Folder(folder, files), tensors, frozendict(), groups)


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""Settings that torch's schedulers of learning rates put into groups, whenever they are made."""


def settings_for(
    saved: Sequence[ParamGroup] | None, own: Sequence[ParamGroup]
) -> tuple[tuple[Mapping[str, Any], ...], list[Problem]]:
    """Return the saved settings for each group of an optimizer, and the problems found.

    Args:
        saved: The saved groups; None if they are not known.
        own: The optimizer's groups, with the paths of the tensors that this rank holds.
    """
    if saved is None:
        return tuple(group.settings for group in own), []
    was_in = {path: number for number, group in enumerate(saved) for path in group.paths}
    found: list[Mapping[str, Any]] = []
    problems: list[Problem] = []
    for number, group in enumerate(own):
        before = {was_in[path]: path for path in group.paths if path in was_in} or {number: ""}
        cause, fix = "", "Make the groups as those that were saved"
        if len(before) > 1:
            cause = f"group {number} trains tensors that were in several groups: {', '.join(before.values())}"
        elif (first := next(iter(before))) >= len(saved):
            cause = f"it has {len(own)} groups of parameters, and {len(saved)} were saved"
        elif names := sorted((saved[first].settings.keys() ^ group.settings.keys()) - _OF_SCHEDULERS):
            cause = f"group {number} has not the settings that were saved: one of the two lacks {', '.join(names)}"
            fix = "Make the same optimizer as the one that was saved"
        else:
            found.append(saved[first].settings)
        problems += [Problem("optimizer", cause, fix)] if cause else []
        problems += [
            Problem(path, "the optimizer that was saved did not train it", "Train what was trained then")
            for path in group.paths
            if path not in was_in
        ]
    return tuple(found), problems


def _no_states(folder: str) -> Problem:
    """Return the problem with a folder that has no states."""
    if not Path(folder).is_dir():
        return Problem(folder, "there is no such folder", "Name the folder that save_checkpoint wrote")
    if (Path(folder) / ".metadata").exists():
        cause = "it is a distributed checkpoint, whose states torch.distributed.checkpoint.load reads"
        return Problem(folder, cause, "Save it as a Hugging Face folder to go on here")
    return Problem(folder, "it holds no states of an optimizer", _SAVE)


def _groups(folder: str, training: Mapping[str, Any]) -> tuple[ParamGroup, ...]:
    """Return the groups that a manifest records."""
    found: list[ParamGroup] = []
    for group in training.get("groups", ()) if isinstance(training.get("groups"), list) else (None,):
        match group:
            case {"settings": dict(settings), "paths": list(paths)} if all(isinstance(path, str) for path in paths):
                found.append(ParamGroup(settings, tuple(paths)))
            case _:
                raise PlanError([Problem(folder, "what manifest.json says of the training is damaged", _SAVE)])
    return tuple(found)


def _by_key(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Flatten states by name and path to states by ``name/path``."""
    return {f"{name}/{path}": value for name, paths in states.items() for path, value in paths.items()}
