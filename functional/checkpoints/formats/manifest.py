"""``manifest.json`` of a folder that ``save_checkpoint`` wrote: lengths of its files and checksums of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from frozendict import frozendict

from ....specs.errors import PlanError, Problem
from ....specs.stored import StoredFile
from .untrusted import is_plain_name, read_object

NAME = "manifest.json"
FORMAT = "shardplan checkpoint 1"

_SUM = re.compile(r"[0-9a-f]{16}")
_FIX = f"Take a copy that is whole; if something else wrote the folder since, remove its {NAME}"


@frozen
class Manifest:
    """Files, checksums and training settings of a saved folder.

    Args:
        files: Length of each file of tensors in bytes, by name.
        sums: Checksums of the tensors in each file, by key.
        training: Groups of the optimizer; None if it was not saved.
    """

    files: frozendict[str, int]
    sums: frozendict[str, frozendict[str, int]]
    training: Mapping[str, Any] | None


def read_manifest(folder: str) -> Manifest | None:
    """Read the manifest of a folder; None if there is none.

    Raises:
        PlanError: If the manifest is damaged.
    """
    if not (Path(folder) / NAME).exists():
        return None
    match read_object(folder, NAME):
        case {"format": str(found)} if found != FORMAT:
            raise PlanError([Problem(NAME, f"its format is {found!r}, and {FORMAT!r} is known", "Take a newer shardplan")])
        case {"format": str(), "files": dict(files), "tensors": dict(tensors), **others} if (
            all(is_safetensors_name(name) and type(size) is int for name, size in files.items())
            and files.keys() == tensors.keys()
            and all(isinstance(keys, dict) and all(map(_is_sum, keys.values())) for keys in tensors.values())
            and isinstance(training := others.get("training"), (dict, type(None)))
        ):
            sums = {
                name: frozendict({key: int(digits, 16) for key, digits in keys.items()}) for name, keys in tensors.items()
            }
            return Manifest(frozendict(files), frozendict(sums), training)
        case _:
            raise PlanError([Problem(NAME, "it is damaged: it lacks files, or the sums of their tensors", _FIX)])


def is_safetensors_name(name: object) -> bool:
    """Tell whether a value is the name of a safetensors file directly in its folder.

    >>> is_safetensors_name("model.safetensors"), is_safetensors_name("../model.safetensors")
    (True, False)
    """
    return isinstance(name, str) and name.endswith(".safetensors") and is_plain_name(name)


def wrong_lengths(folder: str, manifest: Manifest) -> Iterator[Problem]:
    """Iterate over problems with files of a manifest that are missing or have another length."""
    for name, size in manifest.files.items():
        path = Path(folder) / name
        held = _named(manifest.sums[name])
        if not path.is_file():
            yield Problem(name, f"it is not there, and {NAME} has it{held}", _FIX)
        elif (found := path.stat().st_size) != size:
            yield Problem(name, f"it has {found} bytes, and had {size} when it was saved{held}", _FIX)


def wrong_keys(file: StoredFile, keys: Collection[str], manifest: Manifest) -> Iterator[Problem]:
    """Iterate over keys that only the file or only the manifest has."""
    sums = manifest.sums.get(file.name)
    if sums is None:
        yield Problem(file.name, f"it is here, and {NAME} does not know it", _FIX)
        return
    for key in keys:
        if key not in sums:
            yield Problem(key, f"it is in {file.name}, and was not when that was saved", _FIX)
    for key in sums:
        if key not in keys:
            yield Problem(key, f"it was in {file.name} when that was saved, and is not", _FIX)


def _is_sum(digits: object) -> bool:
    return isinstance(digits, str) and _SUM.fullmatch(digits) is not None


def _named(keys: Collection[str]) -> str:
    """Return words that name a tensor of a file and count the rest."""
    if not keys:
        return ""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f", with {next(iter(keys))!r}{more} in it"
