"""Tensors in files: where their bytes begin, and how they make up a model's tensors."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen
from attrs.validators import deep_iterable, ge, optional

from .dtypes import is_known, num_bytes
from .index import Index, index_shape
from .intervals import Interval, common
from .json_values import check_integer

Box = tuple[Interval, ...]
"""An interval of each axis."""


@frozen
class StoredFile:
    """A file that tensors are read from.

    Args:
        name: Its path within the folder.
        num_bytes: Its length.
        digest: SHA-256 of the file's description of its tensors, in hexadecimal digits; empty if it has none.
    """

    name: str
    num_bytes: int
    digest: str = ""


@frozen
class StoredTensor:
    """A tensor whose elements lie one after another in a file, the last axis running fastest.

    Args:
        file: Name of the file.
        key: Its name there.
        offset: Byte of the file at which its elements begin.
        shape: Its shape.
        dtype: torch's name of the element type.
        sum: Position sum of its elements, as ``shardplan.functional.checkpoints.checksum`` has it; None if nobody
            wrote it down.

    Raises:
        ValueError: If the dtype is unknown.
    """

    file: str
    key: str
    offset: int = field(validator=[check_integer, ge(0)])
    shape: tuple[int, ...] = field(converter=tuple, validator=deep_iterable([check_integer, ge(0)]))
    dtype: str
    sum: int | None = field(default=None, validator=optional(check_integer))

    def __attrs_post_init__(self) -> None:
        if not is_known(self.dtype):
            msg = f"{self.key} of {self.file}: dtype {self.dtype!r} is unknown to plans"
            raise ValueError(msg)

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return num_bytes(self.dtype)


@frozen
class Part:
    """A box of a stored tensor, and the place that it fills in a tensor of the model.

    Args:
        stored: The stored tensor.
        box: The box that is taken of it.
        at: Where it begins in the tensor, for each axis of that.
        axes: For each axis of the tensor the stored axis; -1 for a new axis, of size 1.

    >>> expert = StoredTensor("model.safetensors", "experts.1.w3.weight", 4096, (6, 4), "bfloat16")
    >>> part = Part(expert, ((0, 6), (0, 4)), at=(1, 6, 0), axes=(-1, 0, 1))
    >>> part.shape, part.within((((0, 2),), ((6, 9),), ((0, 4),)))
    ((1, 6, 4), (((1, 2),), ((6, 9),), ((0, 4),)))
    """

    stored: StoredTensor
    box: Box
    at: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def whole(cls, stored: StoredTensor) -> Part:
        """Return a stored tensor as all of a tensor of the model."""
        num_axes = len(stored.shape)
        return cls(stored, tuple((0, size) for size in stored.shape), (0,) * num_axes, tuple(range(num_axes)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the tensor of the model."""
        sizes = [stop - start for start, stop in self.box]
        return tuple(sizes[axis] if axis >= 0 else 1 for axis in self.axes)

    def within(self, index: Index) -> Index | None:
        """Return its intersection with a part of the tensor, in the tensor's entries; None for nothing."""
        found: list[tuple[Interval, ...]] = []
        for intervals, at, size in zip(index, self.at, self.shape, strict=True):
            found.append(common(intervals, ((at, at + size),)))
        return tuple(found) if 0 not in index_shape(tuple(found)) else None


@frozen
class Folder:
    """The files that a plan reads.

    Args:
        path: The folder, as it was given.
        files: Its files that are read.
    """

    path: str
    files: tuple[StoredFile, ...]


@frozen
class Contents:
    """The tensors of a checkpoint, by key, in whichever format it is stored.

    Args:
        folder: The checkpoint's files.
        tensors: The parts of each tensor; together they cover it, each element once.
    """

    folder: Folder
    tensors: Mapping[str, tuple[Part, ...]]
