"""What a folder has of an optimizer's states, whoever wrote it. No torch."""

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

OPTIMIZER = "optimizer.safetensors"
"""The file of the states, beside the weights."""

_SAVE = "Save it with the optimizer: save_checkpoint(plan, model, folder, optimizer=optimizer)"


@frozen
class Group:
    """A group of an optimizer's parameters.

    Args:
        settings: Such as ``lr``: plain values.
        paths: The tensors that it trains.
    """

    settings: Mapping[str, Any]
    paths: tuple[str, ...]


@frozen
class SavedStates:
    """States by ``name/path``.

    Args:
        folder: The files.
        tensors: Those that lie in files: what each is made of.
        numbers: Others.
        groups: The optimizer's groups; None if the folder does not say.
    """

    folder: Folder
    tensors: Mapping[str, tuple[Part, ...]]
    numbers: Mapping[str, float]
    groups: tuple[Group, ...] | None


def saved_states(folder: str) -> SavedStates:
    """Return what a folder has of an optimizer's states: one that ``save_checkpoint`` wrote, or a universal checkpoint.

    The float32 weights of a universal checkpoint are states too, as DeepSpeed keeps them beside weights of fewer bits.

    Raises:
        PlanError: If it has none, or they are damaged.
    """
    if (Path(folder) / ZERO).is_dir():
        states, weights = read_states(folder), read(folder)
        named = {WEIGHTS: weights.tensors, **states.tensors}
        files = dict.fromkeys((*states.folder.files, *weights.folder.files))
        return SavedStates(Folder(folder, tuple(files)), _by_key(named), _by_key(states.numbers), None)
    manifest = read_manifest(folder)
    if manifest is None or manifest.training is None or OPTIMIZER not in manifest.files:
        raise PlanError([_nothing(folder)])
    groups = _groups(folder, manifest.training)
    files, held, problems = read_files(folder, [OPTIMIZER], manifest)
    if problems:
        raise PlanError(problems)
    tensors = {key: (Part.whole(stored),) for key, stored in held[OPTIMIZER].items()}
    return SavedStates(Folder(folder, files), tensors, frozendict(), groups)


def settings_for(saved: Sequence[Group] | None, own: Sequence[Group]) -> tuple[tuple[Mapping[str, Any], ...], list[Problem]]:
    """Return the settings that each group of an optimizer gets, those that its tensors had; and what is wrong.

    Args:
        saved: The groups that were saved; None if nobody knows them.
        own: Those of the optimizer, with those of their tensors that this rank holds.
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
        elif names := sorted(saved[first].settings.keys() ^ group.settings.keys()):
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


def _nothing(folder: str) -> Problem:
    if not Path(folder).is_dir():
        return Problem(folder, "there is no such folder", "Name the folder that save_checkpoint wrote")
    if (Path(folder) / ".metadata").exists():
        cause = "it is a distributed checkpoint, whose states torch.distributed.checkpoint.load reads"
        return Problem(folder, cause, "Save it as a Hugging Face folder to go on here")
    return Problem(folder, "it holds no states of an optimizer", _SAVE)


def _groups(folder: str, training: Mapping[str, Any]) -> tuple[Group, ...]:
    found: list[Group] = []
    for group in training.get("groups", ()) if isinstance(training.get("groups"), list) else (None,):
        match group:
            case {"settings": dict(settings), "paths": list(paths)} if all(isinstance(path, str) for path in paths):
                found.append(Group(settings, tuple(paths)))
            case _:
                raise PlanError([Problem(folder, "what manifest.json says of the training is damaged", _SAVE)])
    return tuple(found)


def _by_key(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}/{path}": value for name, paths in states.items() for path, value in paths.items()}
