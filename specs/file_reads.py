"""Bytes that ranks read from files while a plan is executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import frozen

from .dtypes import human_bytes
from .mesh import Coordinate


@frozen
class FileRead:
    """Bytes that each rank of a distinct coordinate reads from a file.

    Ranks of a distinct coordinate read equally many bytes. Parts of a tensor that is stored in several files, such as
    experts, may lie in other files for other ranks than for the first.

    Args:
        coordinate: The first of these ranks.
        num_ranks: Number of these ranks.
        file: The file's path within the plan's folder.
        num_bytes: Bytes of tensors that each rank reads; headers come on top.
    """

    coordinate: Coordinate
    num_ranks: int
    file: str
    num_bytes: int


def rows(reads: Iterable[FileRead]) -> Iterator[tuple[str, ...]]:
    """Iterate over the rows of a table, with its head: a row for the ranks of a stage that read alike."""
    yield "stage", "ranks", "first", "files", "bytes to each rank", "most of one file"
    each: dict[Coordinate, list[FileRead]] = {}
    for read in reads:
        each.setdefault(read.coordinate, []).append(read)
    alike: dict[tuple[int, tuple[tuple[str, int], ...]], list[FileRead]] = {}
    for here, found in each.items():
        alike.setdefault((here.pipe, tuple((read.file, read.num_bytes) for read in found)), []).append(found[0])
    for (stage, files), firsts in alike.items():
        names = files[0][0] if len(files) == 1 else f"{len(files)}, {files[0][0]} .. {files[-1][0]}"
        sizes = [num_bytes for _, num_bytes in files]
        num_ranks, first = sum(read.num_ranks for read in firsts), firsts[0].coordinate.rank
        yield str(stage), str(num_ranks), str(first), names, human_bytes(sum(sizes)), human_bytes(max(sizes))


def total_bytes(reads: Iterable[FileRead]) -> int:
    """Return the bytes that all ranks read together."""
    return sum(read.num_ranks * read.num_bytes for read in reads)
