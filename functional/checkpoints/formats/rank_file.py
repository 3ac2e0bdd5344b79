"""The file of a single rank: its parts of all tensors, and for which plan they are. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import frozen

from ....specs.dtypes import short_name
from ....specs.errors import PlanError, Problem
from ....specs.stored import StoredFile, StoredTensor
from .safetensors import header_bytes, read_header
from .strict_json import parse_object

_MARK = "shardplan shard 1"
_FIX = "Write it again: shardplan materialize plan.json --rank {} -o {}"

Taken = tuple[str, int]
"""A part of a checkpoint: path of the model's tensor, and number among its parts."""


@frozen
class OwnFile:
    """What a file of a single rank says of itself.

    Args:
        plan: Fingerprint of the plan.
        rank: The rank.
        sums: Position sum of each tensor in it, by path.
        loaded: Sums of what the tensors were read from, as far as they count on this rank.
    """

    plan: str
    rank: int
    sums: Mapping[str, int]
    loaded: Mapping[Taken, int]

    def metadata(self) -> dict[str, str]:
        """Return it as the strings that a header holds; they are as long whatever the sums are."""
        return {
            "format": _MARK,
            "plan": self.plan,
            "rank": str(self.rank),
            "sums": json.dumps({path: f"{number:016x}" for path, number in self.sums.items()}),
            "loaded": json.dumps([[path, number, f"{found:016x}"] for (path, number), found in self.loaded.items()]),
        }


def own_name(rank: int) -> str:
    """Return the name of a rank's file.

    >>> own_name(17)
    'rank-00017.safetensors'
    """
    return f"rank-{rank:05d}.safetensors"


def read_own_file(folder: str, rank: int, plan: str) -> tuple[OwnFile, StoredFile, dict[str, StoredTensor]]:
    """Return what a rank's file says of itself, the file, and its tensors by path.

    Args:
        folder: The folder of such files.
        rank: The rank.
        plan: Fingerprint of the plan that it is to be for.

    Raises:
        PlanError: If it is not there, damaged, or of another plan or rank.
    """
    name = own_name(rank)
    fix = _FIX.format(rank, folder)
    file, tensors = read_header(folder, name)
    with (Path(folder) / name).open("rb") as handle:
        found = parse_object(header_bytes(handle, file.num_bytes)).get("__metadata__", {})
    try:
        sums = {path: int(digits, 16) for path, digits in parse_object(found["sums"].encode()).items()}
        loaded = {(path, number): int(digits, 16) for path, number, digits in json.loads(found["loaded"])}
        own = OwnFile(found["plan"], int(found["rank"]), sums, loaded)
        is_ours = found["format"] == _MARK and sums.keys() == tensors.keys()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        own, is_ours = OwnFile("", -1, {}, {}), False
    if not is_ours:
        raise PlanError([Problem(name, "it does not say for which plan and rank its tensors are", fix)])
    problems: list[Problem] = []
    if own.rank != rank:
        problems.append(Problem(name, f"it is of rank {own.rank}, under the name of rank {rank}'s", fix))
    if own.plan != plan:
        problems.append(Problem(name, f"it is of plan {own.plan[:12]}, and this one came from {plan[:12]}", fix))
    if problems:
        raise PlanError(problems)
    return own, file, tensors


def wrong_tensors(
    name: str, wanted: Iterable[tuple[str, str, tuple[int, ...]]], tensors: Mapping[str, StoredTensor]
) -> list[Problem]:
    """Return the tensors that a rank's file lacks, or has otherwise: path, dtype and local shape are wanted."""
    problems: list[Problem] = []
    for path, dtype, shape in wanted:
        stored = tensors.get(path)
        if stored is None:
            problems.append(Problem(path, f"{name} does not have it", "Write the file again"))
        elif (stored.dtype, stored.shape) != (dtype, shape):
            there = f"{short_name(stored.dtype)}{list(stored.shape)}"
            cause = f"in {name} it is {there}, and planned is {short_name(dtype)}{list(shape)}"
            problems.append(Problem(path, cause, "Write the file again"))
    return problems


def damaged(name: str, own: OwnFile, found: Mapping[str, int]) -> list[Problem]:
    """Return the tensors whose sums are not those that were written down."""
    cause = "what is read of {} has the sum {:016x}, and {:016x} was written: it is damaged"
    return [
        Problem(path, cause.format(name, number, own.sums[path]), "Write the file again")
        for path, number in found.items()
        if number != own.sums[path]
    ]
