"""Which stored tensors can be checked by their sums, and which parts of tensors count for them. No torch, no numpy."""

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

Stored = tuple[str, str]
"""A stored tensor: file and key."""


@frozen
class Known:
    """A stored tensor whose sum was written down, and all of which is read.

    Args:
        sum: The sum.
        counting: The parts of the model's tensors that make it up: canonical path, and number among its parts.
    """

    sum: int
    counting: frozenset[tuple[str, int]]


def known_sums(tree: SpecTree) -> dict[Stored, Known]:
    """Return what can be checked, in an order that is the same on all ranks.

    What several tensors read alike counts for the first of them.
    """
    found: dict[Stored, dict[object, tuple[str, int, Part]]] = {}
    for spec in tree.values():
        for number, part in enumerate(spec.source.parts if isinstance(spec.source, (Loaded, Materialised)) else ()):
            if part.stored.sum is not None:
                key = part.stored.file, part.stored.key
                found.setdefault(key, {}).setdefault(part.box, (spec.path, number, part))
    return {key: known for key, parts in sorted(found.items()) if (known := _known(list(parts.values())))}


def differing(known: Mapping[Stored, Known], sums: Mapping[Stored, int], now: Mapping[Stored, int]) -> Iterator[Problem]:
    """Iterate over the stored tensors whose sums are not those that were written down.

    Args:
        known: What was written down when the plan was made.
        sums: What was read.
        now: What is written down by now.
    """
    for (file, key), one in known.items():
        if sums[file, key] == one.sum:
            continue
        if now.get((file, key)) == sums[file, key]:
            cause = f"{file} was saved again after the plan was made: it has other values than were planned"
            yield Problem(key, cause, "Plan again")
        else:
            cause = f"what is read of {file} has the sum {sums[file, key]:016x}, and {one.sum:016x} was saved: it is damaged"
            yield Problem(key, cause, "Copy or download the file again, or go back to the checkpoint before")


def _known(parts: list[tuple[str, int, Part]]) -> Known | None:
    stored = parts[0][2].stored
    in_file = [evolve(part, at=tuple(a for a, _ in part.box), axes=tuple(range(len(part.box)))) for *_, part in parts]
    if stored.sum is None or miscovered(stored.shape, in_file) is not None:
        return None
    return Known(stored.sum, frozenset((path, number) for path, number, _ in parts))
