"""Checksums that loading must reproduce, and the parts of tensors that add up to each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from ...specs.errors import Problem
from ...specs.source import Loaded, Materialised
from .assembly import miscovered

if TYPE_CHECKING:
    from ...specs.stored import Part
    from ...specs.tree import SpecTree

FileKey = tuple[str, str]
"""A stored tensor's file and key."""


@frozen
class ExpectedSum:
    """The recorded checksum of a stored tensor that is read whole.

    Args:
        sum: The checksum.
        counting: The parts that cover the stored tensor, each as its tensor's canonical path and the part's number.
    """

    sum: int
    counting: frozenset[tuple[str, int]]


def expected_sums(tree: SpecTree) -> dict[FileKey, ExpectedSum]:
    """Return the checksums that can be verified, in the same order on all ranks.

    A box that several tensors read counts for the first of them.
    """
    found: dict[FileKey, dict[object, tuple[str, int, Part]]] = {}
    for spec in tree.values():
        for number, part in enumerate(spec.source.parts if isinstance(spec.source, (Loaded, Materialised)) else ()):
            if part.stored.sum is not None:
                key = part.stored.file, part.stored.key
                found.setdefault(key, {}).setdefault(part.box, (spec.path, number, part))
    return {key: one for key, parts in sorted(found.items()) if (one := _expected(list(parts.values())))}


def wrong_sums(
    expected: Mapping[FileKey, ExpectedSum], sums: Mapping[FileKey, int], recorded_now: Mapping[FileKey, int]
) -> Iterator[Problem]:
    """Iterate over problems with tensors whose checksum is unexpected; ``recorded_now`` tells a later save from damage."""
    for (file, key), one in expected.items():
        if sums[file, key] == one.sum:
            continue
        if recorded_now.get((file, key)) == sums[file, key]:
            cause = f"{file} was saved again after the plan was made: it has other values than were planned"
            yield Problem(key, cause, "Plan again")
        else:
            cause = f"what is read of {file} has the sum {sums[file, key]:016x}, and {one.sum:016x} was saved: it is damaged"
            yield Problem(key, cause, "Copy or download the file again, or go back to the checkpoint before")


def _expected(parts: list[tuple[str, int, Part]]) -> ExpectedSum | None:
    """Return the recorded checksum of the stored tensor if the parts cover it, else None."""
    stored = parts[0][2].stored
    in_file = [evolve(part, at=tuple(a for a, _ in part.box), axes=tuple(range(len(part.box)))) for *_, part in parts]
    if stored.sum is None or miscovered(stored.shape, in_file) is not None:
        return None
    return ExpectedSum(stored.sum, frozenset((path, number) for path, number, _ in parts))
