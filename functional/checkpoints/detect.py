"""Detect a checkpoint's format and list its tensors; only headers are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ...specs.errors import PlanError, Problem
from ...specs.stored import Contents
from .formats import dcp, hugging_face, universal

_FORMATS: Mapping[str, Callable[[str], Contents]] = {
    hugging_face.SINGLE: hugging_face.read,
    hugging_face.INDEX: hugging_face.read,
    dcp.METADATA: dcp.read,
    universal.ZERO: universal.read,
}
"""The reader of each format, by the file or folder that marks a checkpoint of that format."""

_FIX = (
    "It holds model.safetensors, or several files and model.safetensors.index.json; or .metadata (DCP); or zero/ (universal)"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NUM_NAMED = 8


def read_contents(folder: str) -> Contents:
    """Return the tensors of a checkpoint folder in any of the known formats.

    Raises:
        PlanError: If the folder holds no known format, several of them, or damaged files.
    """
    path = Path(folder)
    if not path.is_dir():
        cause = "it is a file" if path.exists() else "there is no such folder"
        fix = f"Name the folder: {str(path.parent)!r}" if path.exists() else "Download it first, and name where it lies"
        raise PlanError([Problem(folder, cause, fix)])
    marks = [mark for mark in _FORMATS if (path / mark).exists()]
    if not marks:
        raise PlanError([_unknown(path)])
    if len(marks) > 1:
        cause = f"it holds {' and '.join(marks)}, and nothing says which of them is meant"
        raise PlanError([Problem(folder, cause, "Remove what is out of date")])
    return _FORMATS[marks[0]](folder)


def _unknown(path: Path) -> Problem:
    """Return the problem with a folder in no known format."""
    names = sorted(entry.name for entry in path.iterdir())
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        cause = f"its weights are in {pickles[0]}, a pickle: reading one can run any code, so that none is read"
        fix = "Convert it: AutoModel.from_pretrained(folder).save_pretrained(other), or DeepSpeed's ds_to_universal"
        return Problem(str(path), cause, fix)
    named = ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")
    return Problem(str(path), f"it holds no checkpoint that can be read: {named or 'nothing at all'}", _FIX)
