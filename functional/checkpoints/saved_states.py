"""What a folder has of an optimizer's states, whoever wrote it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from frozendict import frozendict

from ...specs.errors import PlanError, Problem
from ...specs.stored import Folder, Part
from .hugging_face import read_files
from .manifest_check import read_manifest
from .universal import WEIGHTS, read, read_states

OPTIMIZER = "optimizer.safetensors"
"""The file of the states, beside the weights."""

_SAVE = "Save it with the optimizer: save_checkpoint(plan, model, folder, optimizer=optimizer)"


@frozen
class SavedStates:
    """States by ``name/path``.

    Args:
        folder: The files.
        tensors: Those that lie in files: what each is made of.
        numbers: Others.
        groups: Settings of the optimizer's groups of parameters; None if the folder does not say.
    """

    folder: Folder
    tensors: Mapping[str, tuple[Part, ...]]
    numbers: Mapping[str, float]
    groups: tuple[Mapping[str, Any], ...] | None


def saved_states(folder: str) -> SavedStates:
    """Return what a folder has of an optimizer's states: one that ``save_checkpoint`` wrote, or a universal checkpoint.

    The float32 weights of a universal checkpoint are states too, as DeepSpeed keeps them beside weights of fewer bits.

    Raises:
        PlanError: If it has none, or they are damaged.
    """
    if (Path(folder) / "zero").is_dir():
        states, weights = read_states(folder), read(folder)
        named = {WEIGHTS: weights.tensors, **states.tensors}
        files = dict.fromkeys((*states.folder.files, *weights.folder.files))
        return SavedStates(Folder(folder, tuple(files)), _by_key(named), _by_key(states.numbers), None)
    manifest = read_manifest(folder)
    if manifest is None or manifest.training is None or OPTIMIZER not in manifest.files:
        raise PlanError([Problem(folder, "it holds no states of an optimizer", _SAVE)])
    files, held, problems = read_files(folder, [OPTIMIZER], manifest)
    if problems:
        raise PlanError(problems)
    tensors = {key: (Part.whole(stored),) for key, stored in held[OPTIMIZER].items()}
    return SavedStates(Folder(folder, files), tensors, frozendict(), tuple(manifest.training.get("groups", ())))


def _by_key(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}/{path}": value for name, paths in states.items() for path, value in paths.items()}
