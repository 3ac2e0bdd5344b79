"""What a folder holds by key, whichever format it is in. Only headers are read; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from ...specs.errors import PlanError, Problem
from ...specs.stored import Folder, Part

_FIX = (
    "It holds model.safetensors, or several files and model.safetensors.index.json; or .metadata (DCP); or zero/ (universal)"
)
_MARKS = ("model.safetensors", "model.safetensors.index.json", ".metadata", "zero")
_NUM_NAMED = 8


@frozen
class Contents:
    """The tensors of a checkpoint.

    Args:
        folder: Its files.
        tensors: For each key the parts that it is made of; together they are the whole tensor.
    """

    folder: Folder
    tensors: Mapping[str, tuple[Part, ...]]


def read_contents(folder: str) -> Contents:
    """Return what a folder holds: a Hugging Face one, one of torch's distributed checkpoints, or a universal checkpoint.

    Raises:
        PlanError: If it holds none of them, several, or what is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        cause = "it is a file" if path.exists() else "there is no such folder"
        fix = f"Name the folder: {str(path.parent)!r}" if path.exists() else "Download it first, and name where it lies"
        raise PlanError([Problem(folder, cause, fix)])
    found = [name for name in _MARKS if (path / name).exists()]
    match found:
        case []:
            raise PlanError([_unknown(path)])
        case [".metadata"]:
            from .formats import dcp

            return dcp.read(folder)
        case ["zero"]:
            from .formats import universal

            return universal.read(folder)
        case [_]:
            from .formats import hugging_face

            return hugging_face.read(folder)
        case _:
            cause = f"it holds {' and '.join(found)}, and nothing says which of them is meant"
            raise PlanError([Problem(folder, cause, "Remove what is out of date")])


def _unknown(path: Path) -> Problem:
    names = sorted(entry.name for entry in path.iterdir())
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]:
        cause = f"its weights are in {pickles[0]}, a pickle: reading one can run any code, so that none is read"
        fix = "Convert it: AutoModel.from_pretrained(folder).save_pretrained(other), or DeepSpeed's ds_to_universal"
        return Problem(str(path), cause, fix)
    named = ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")
    return Problem(str(path), f"it holds no checkpoint that can be read: {named or 'nothing at all'}", _FIX)
