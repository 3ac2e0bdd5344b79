"""The record of a tensor, and the part of it that each coordinate holds."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, field, frozen
from attrs.validators import deep_iterable, ge, in_, instance_of
from frozendict import deepfreeze, frozendict

from .dtypes import is_known, num_bytes, short_name
from .index import Index, whole_index
from .json_values import check_integer, check_plain
from .mesh import SPLIT_AXES, MeshAxis, whole_of
from .paths import module_of
from .shard import Shard
from .source import Source, Unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .mesh import Coordinate, Mesh

Kind = Literal["parameter", "buffer", "non_persistent_buffer"]
"""The role of a tensor in its module."""


@frozen
class Origin:
    """Which line of the user's code decided something.

    >>> str(Origin("shard", "**.q_proj.weight", "train.py:12"))
    "train.py:12 .at['**.q_proj.weight'].shard"
    """

    verb: str
    pattern: str
    where: str

    def __str__(self) -> str:
        return f"{self.where} .at[{self.pattern!r}].{self.verb}"


def _freeze_tags(tags: Mapping[str, Any]) -> frozendict[str, Any]:
    return deepfreeze(dict(sorted(tags.items()))) if tags else frozendict()


@frozen
class ParamSpec:
    """A tensor of a model: a single storage, under a path and perhaps aliases.

    Args:
        path: Canonical path: the first that ``named_parameters`` (or ``named_buffers``) meets.
        orig_shape: Shape before anything is split.
        dtype: torch's name of the element type, e.g. ``bfloat16``.
        kind: Parameter, buffer, or buffer that is not saved.
        shards: Which axes are split over which mesh axes.
        stage: Pipeline stage that owns it.
        also_on: Other stages that hold a copy.
        tags: Notes of the user: names to plain values.
        tie: All other paths of the same tensor.
        requires_grad: Whether it is trained.
        source: Where its values come from.
        origin: The line that decided its layout; outside equality and fingerprint.

    Raises:
        ValueError: If the dtype is unknown, a shard names an axis that the shape has not, an axis or mesh axis is split
            twice, or the tensor is split over ``data`` and over ``expert``, which is a part of it.

    >>> from shardplan.specs import Mesh
    >>> spec = ParamSpec("up_proj.weight", (4096, 1024), "bfloat16", shards=(Shard(0),))
    >>> print(spec)
    up_proj.weight  bf16[4096@tensor, 1024]
    >>> spec.local_shape(Mesh(tensor=8).coordinate(3)), spec.shard_axis
    ((512, 1024), 0)
    """

    path: str = field(validator=instance_of(str))
    orig_shape: tuple[int, ...] = field(converter=tuple, validator=deep_iterable([check_integer, ge(0)]))
    dtype: str
    kind: Kind = field(default="parameter", validator=in_(("parameter", "buffer", "non_persistent_buffer")))
    shards: tuple[Shard, ...] = field(default=(), converter=tuple, validator=deep_iterable(instance_of(Shard)))
    stage: int = field(default=0, validator=[check_integer, ge(0)])
    also_on: tuple[int, ...] = field(default=(), converter=tuple, validator=deep_iterable([check_integer, ge(0)]))
    tags: frozendict[str, Any] = field(factory=frozendict, converter=_freeze_tags, validator=check_plain)
    tie: tuple[str, ...] = field(default=(), validator=deep_iterable(instance_of(str), instance_of(tuple)))
    requires_grad: bool = True
    source: Source = field(factory=Unknown)
    origin: Origin | None = field(default=None, eq=False)

    def __attrs_post_init__(self) -> None:
        if not is_known(self.dtype):
            msg = f"{self.path}: dtype {self.dtype!r} is unknown to plans"
            raise ValueError(msg)
        for what, used in (("axis", [s.axis for s in self.shards]), ("mesh axis", [s.mesh_axis for s in self.shards])):
            if len(set(used)) < len(used):
                msg = f"{self.path}: one {what} is split twice: {self.shards}"
                raise ValueError(msg)
        over = [shard.mesh_axis for shard in self.shards]
        for part, whole in ((m, whole_of(m)) for m in over):
            if part != whole and whole in over:
                msg = f"{self.path}: it is split over {whole!r} and over {part!r}, which is a part of {whole!r}"
                raise ValueError(msg)
        for shard in self.shards:
            if shard.axis >= len(self.orig_shape):
                msg = f"{self.path}: no axis {shard.axis} in shape {list(self.orig_shape)}"
                raise ValueError(msg)

    @property
    def shard_axis(self) -> int | None:
        """The axis that is split, None if none is.

        Raises:
            ValueError: If several are; then ask ``shards``.
        """
        if len(self.shards) > 1:
            msg = f"{self.path} is split along {len(self.shards)} axes; ask .shards"
            raise ValueError(msg)
        return self.shards[0].axis if self.shards else None

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths of the tensor, the canonical path first."""
        return (self.path, *self.tie)

    @property
    def module(self) -> str:
        """Path of the module that holds it, by its canonical path."""
        return module_of(self.path)

    def places(self, mesh: Mesh) -> tuple[int, ...]:
        """Return the places along ``pipe`` that hold it, the owner's first.

        >>> from shardplan.specs import Mesh
        >>> ParamSpec("head.weight", (4, 4), "float32", stage=0, also_on=(3, 4)).places(Mesh(pipe=2))
        (0, 1)
        """
        return tuple(dict.fromkeys(stage % mesh.pipe for stage in (self.stage, *self.also_on)))

    @property
    def num_elements(self) -> int:
        """Elements before anything is split."""
        return prod(self.orig_shape)

    @property
    def num_bytes(self) -> int:
        """Bytes before anything is split."""
        return self.num_elements * num_bytes(self.dtype)

    def index(self, coordinate: Coordinate) -> Index:
        """Return the part that ``coordinate`` holds: the intervals of each axis; padding is not in it.

        >>> from shardplan.specs import Mesh
        >>> spec = ParamSpec("qkv.weight", (12, 6), "float32", shards=(Shard(0, blocks=(8, 4)), Shard(1, "data")))
        >>> spec.index(Mesh(data=2, tensor=2).coordinate(3))
        (((4, 8), (10, 12)), ((3, 6),))
        """
        intervals = list(whole_index(self.orig_shape))
        for shard in self.shards:
            intervals[shard.axis] = shard.intervals(self.orig_shape[shard.axis], coordinate)
        return tuple(intervals)

    def local_shape(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Return the shape of the part that ``coordinate`` holds, padding counted."""
        shape = list(self.orig_shape)
        for shard in self.shards:
            shape[shard.axis] = shard.length(shape[shard.axis], coordinate)
        return tuple(shape)

    def local_bytes(self, coordinate: Coordinate) -> int:
        """Return the bytes of the part that ``coordinate`` holds."""
        return prod(self.local_shape(coordinate)) * num_bytes(self.dtype)

    def mesh_axes(self, coordinate: Coordinate) -> tuple[MeshAxis, ...]:
        """Return the mesh axes that really split it on this coordinate's mesh, in mesh order."""
        used = {shard.mesh_axis for shard in self.shards}
        return tuple(m for m in SPLIT_AXES if m in used and coordinate.mesh.num(m) > 1)

    def on(self, mesh_axis: MeshAxis) -> Shard | None:
        """Return the split over a mesh axis, None if there is none."""
        return next((shard for shard in self.shards if shard.mesh_axis == mesh_axis), None)

    def shard(self, shard: Shard, origin: Origin | None = None) -> ParamSpec:
        """Return the spec with a further axis split."""
        return evolve(self, shards=(*self.shards, shard), origin=origin)

    @property
    def type(self) -> str:
        """The printed form of its type, e.g. ``bf16[4096@tensor, 4096]``."""
        sizes = [str(size) for size in self.orig_shape]
        for shard in self.shards:
            sizes[shard.axis] = shard.axis_type(self.orig_shape[shard.axis])
        return f"{short_name(self.dtype)}[{', '.join(sizes)}]"

    def __str__(self) -> str:
        return f"{self.path}  {self.type}"
