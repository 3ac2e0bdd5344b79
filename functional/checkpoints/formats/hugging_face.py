"""A Hugging Face folder: ``model.safetensors``, or several safetensors files and their index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from attrs import evolve
from frozendict import frozendict

from ....specs.errors import PlanError, Problem
from ....specs.stored import Contents, Folder, Part, StoredFile, StoredTensor
from .manifest import Manifest, is_safetensors_name, read_manifest, wrong_keys, wrong_lengths
from .safetensors import read_header
from .untrusted import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_AGAIN = "Copy or download the folder again"


def read(folder: str) -> Contents:
    """List the tensors of a Hugging Face folder from its headers, its index, and its manifest if there is one.

    Raises:
        PlanError: If a file is missing or damaged, or its tensors differ from the index or the manifest.
    """
    manifest = read_manifest(folder)
    by_index = None if (Path(folder) / SINGLE).exists() else _index(folder)
    names = [SINGLE] if by_index is None else sorted(set(by_index.values()))
    files, held, problems = read_files(folder, names, manifest)
    if by_index is not None:
        problems = [*_with_keys(problems, by_index), *_wrong_places(by_index, held)]
    if problems:
        raise PlanError(problems)
    tensors = {key: (Part.whole(stored),) for name in names for key, stored in held[name].items()}
    return Contents(Folder(folder, files), frozendict(tensors))


def read_files(
    folder: str, names: Iterable[str], manifest: Manifest | None
) -> tuple[tuple[StoredFile, ...], dict[str, dict[str, StoredTensor]], list[Problem]]:
    """Return the named files, the tensors in each by key with their checksums, and the problems of all files."""
    files: list[StoredFile] = []
    held: dict[str, dict[str, StoredTensor]] = {}
    problems = [] if manifest is None else list(wrong_lengths(folder, manifest))
    known = {problem.path for problem in problems}
    wanted = dict.fromkeys(names)
    for name in {**wanted, **({} if manifest is None else manifest.files)}:
        if name in known:
            continue
        try:
            file, tensors, _ = read_header(folder, name)
        except PlanError as error:
            problems += error.problems
            continue
        if manifest is not None:
            problems += wrong_keys(file, tensors.keys(), manifest)
            sums = manifest.sums.get(name, {})
            tensors = {key: evolve(stored, sum=sums.get(key)) for key, stored in tensors.items()}
        if name in wanted:
            files.append(file)
            held[name] = tensors
    return tuple(files), held, problems


def _index(folder: str) -> dict[str, str]:
    """Return the file of each key by the index."""
    match read_object(folder, INDEX):
        case {"weight_map": dict(places)} if places and all(map(is_safetensors_name, places.values())):
            return places
        case _:
            cause = "it has no weight_map that names a .safetensors file of the folder for each tensor"
            raise PlanError([Problem(INDEX, cause, _AGAIN)])


def _with_keys(problems: Iterable[Problem], by_index: Mapping[str, str]) -> Iterator[Problem]:
    """Iterate over problems; a problem of a whole file also names the tensors that the index has in that file."""
    keys: dict[str, list[str]] = {}
    for key, name in by_index.items():
        keys.setdefault(name, []).append(key)
    for problem in problems:
        first, *others = keys.get(problem.path, [""])
        if first:
            more = f" and {len(others)} more" if others else ""
            yield evolve(problem, cause=f"{problem.cause}; by the index {first!r}{more} should be in it")
        else:
            yield problem


def _wrong_places(by_index: Mapping[str, str], held: Mapping[str, Mapping[str, StoredTensor]]) -> Iterator[Problem]:
    """Iterate over tensors that are in another file than the index says."""
    found: dict[str, list[str]] = {}
    for name, tensors in held.items():
        for key in tensors:
            found.setdefault(key, []).append(name)
    for key, name in by_index.items():
        if name in held and key not in held[name]:
            where = f"it is in {' and '.join(found[key])}" if key in found else "none of the files that could be read has it"
            cause = f"the index says that it is in {name}, and {where}"
            yield Problem(key, cause, f"Files may be exchanged, or of another save. {_AGAIN}")
    for key, names in found.items():
        for name in names:
            if key not in by_index:
                yield Problem(key, f"it is in {name}, and the index does not know it", _AGAIN)
            elif by_index[key] != name and by_index[key] in names:
                yield Problem(key, f"it is in {name} too, and the index says that it is in {by_index[key]}", _AGAIN)
