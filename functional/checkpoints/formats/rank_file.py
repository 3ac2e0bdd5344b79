"""``rank-00017.safetensors``: the shards of one rank, and the plan they were made for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from attrs import frozen

from ....specs.dtypes import short_name
from ....specs.errors import PlanError, Problem
from ....specs.stored import StoredFile, StoredTensor
from .safetensors import read_header
from .untrusted import parse_object

_MARK = "shardplan shard 1"
_FIX = "Write it again: shardplan materialize plan.json --rank {} -o {}"

PartKey = tuple[str, int]
"""One part of a loaded tensor: the tensor's path, and the part's number among ``Loaded.parts``."""


@frozen
class RankFile:
    """Metadata of a rank's file.

    Args:
        plan: Fingerprint of the plan.
        rank: The rank.
        sums: Checksum of each tensor in the file, by path.
        loaded: Checksums of the checkpoint's bytes that this rank read and counts, by part.
    """

    plan: str
    rank: int
    sums: Mapping[str, int]
    loaded: Mapping[PartKey, int]

    def metadata(self) -> dict[str, str]:
        """Return the strings of the header; their length does not depend on the checksums."""
        return {
            "format": _MARK,
            "plan": self.plan,
            "rank": str(self.rank),
            "sums": json.dumps({path: f"{number:016x}" for path, number in self.sums.items()}),
            "loaded": json.dumps([[path, number, f"{found:016x}"] for (path, number), found in self.loaded.items()]),
        }


def rank_file_name(rank: int) -> str:
    """Return the file name of a rank.

    >>> rank_file_name(17)
    'rank-00017.safetensors'
    """
    return f"rank-{rank:05d}.safetensors"


def read_rank_file(folder: str, rank: int, plan: str) -> tuple[RankFile, StoredFile, dict[str, StoredTensor]]:
    """Read the header of a rank's file, for the plan of a fingerprint: its metadata, the file, and its tensors by path.

    Raises:
        PlanError: If the file is missing, damaged, or of another plan or rank.
    """
    name = rank_file_name(rank)
    fix = _FIX.format(rank, folder)
    file, tensors, found = read_header(folder, name)
    try:
        sums = {path: int(digits, 16) for path, digits in parse_object(found["sums"].encode()).items()}
        loaded = {(path, number): int(digits, 16) for path, number, digits in json.loads(found["loaded"])}
        own = RankFile(found["plan"], int(found["rank"]), sums, loaded)
        is_ours = found["format"] == _MARK and sums.keys() == tensors.keys()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        own, is_ours = RankFile("", -1, {}, {}), False
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
    """Return problems with tensors that a rank's file lacks, or has with another dtype or local shape."""
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


def damaged(name: str, own: RankFile, found: Mapping[str, int]) -> list[Problem]:
    """Return problems with tensors with a wrong checksum."""
    cause = "what is read of {} has the sum {:016x}, and {:016x} was written: it is damaged"
    return [
        Problem(path, cause.format(name, number, own.sums[path]), "Write the file again")
        for path, number in found.items()
        if number != own.sums[path]
    ]
