"""The device mesh: how ranks are numbered, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args, overload

from attrs import field, fields_dict, frozen
from attrs.validators import ge

from .json_values import check_integer

MeshAxis = Literal["pipe", "data", "expert_data", "expert", "tensor"]
"""A named dimension of the mesh. ``data`` is ``expert_data`` times ``expert``."""

MESH_AXES: tuple[MeshAxis, ...] = ("pipe", "data", "tensor")
"""The mesh axes, outermost first: DeepSpeed's ``PipeModelDataParallelTopology`` (its ``model`` is ``tensor``)."""

_FINE: tuple[MeshAxis, ...] = ("pipe", "expert_data", "expert", "tensor")
"""The same with ``data`` in its two factors."""

_NAMES = get_args(MeshAxis)


def _size() -> int:
    return field(default=1, validator=[check_integer, ge(1)])


@frozen
class Mesh:
    """Ranks arranged along named axes; the last axis varies fastest.

    The rank of coordinate (p, d, t) is ``(p * data + d) * tensor + t``. Experts are spread over ``expert`` neighbours along
    ``data``, which see different batches too: place d is place ``d % expert`` among them, and the ``data / expert`` ranks
    at place ``d // expert`` along ``expert_data`` hold the same experts.

    Args:
        pipe: Number of pipeline stages.
        data: Number of replicas that see different batches.
        tensor: Number of ranks that share one layer.
        expert: Number of ranks that share the experts of a layer; it divides ``data``.

    Raises:
        ValueError: If a size is smaller than 1, or ``expert`` does not divide ``data``.
        TypeError: If a size is no integer.

    >>> mesh = Mesh(pipe=2, data=2, tensor=4)
    >>> mesh.num_ranks, mesh.coordinate(13)
    (16, Coordinate(pipe=1, data=1, tensor=1))
    >>> mesh.groups("tensor")[3], list(mesh.groups("data")[0])
    (range(12, 16), [0, 4])
    """

    pipe: int = _size()
    data: int = _size()
    tensor: int = _size()
    expert: int = _size()

    def __attrs_post_init__(self) -> None:
        if self.data % self.expert:
            msg = f"expert={self.expert} is carved out of data={self.data}, and does not divide it"
            raise ValueError(msg)

    @property
    def expert_data(self) -> int:
        """The number of ranks along ``data`` that hold the same experts."""
        return self.data // self.expert

    @property
    def num_ranks(self) -> int:
        """The number of ranks: pipe x data x tensor."""
        return self.pipe * self.data * self.tensor

    def num(self, *mesh_axes: MeshAxis) -> int:
        """Return the number of ranks along some mesh axes together.

        >>> Mesh(data=2, tensor=4).num("data", "tensor")
        8
        """
        count = 1
        for mesh_axis in mesh_axes:
            count *= self._num(mesh_axis)
        return count

    def coordinate(self, rank: int) -> Coordinate:
        """Return where ``rank`` stands; raise IndexError for a rank outside the mesh."""
        if not 0 <= rank < self.num_ranks:
            msg = f"rank {rank} is not on {self}, whose ranks are 0 to {self.num_ranks - 1}"
            raise IndexError(msg)
        rest, tensor = divmod(rank, self.tensor)
        pipe, data = divmod(rest, self.data)
        return Coordinate(pipe=pipe, data=data, tensor=tensor, mesh=self)

    def rank(self, coordinate: Coordinate) -> int:
        """Return the rank that stands at ``coordinate``: the inverse of :meth:`coordinate`."""
        if coordinate.mesh != self:
            msg = f"{coordinate} stands on {coordinate.mesh}, not on {self}"
            raise ValueError(msg)
        return (coordinate.pipe * self.data + coordinate.data) * self.tensor + coordinate.tensor

    def groups(self, *mesh_axes: MeshAxis) -> Groups:
        """Return the groups of ranks that differ only along ``mesh_axes``, in the order of their first ranks.

        Raises:
            ValueError: If the axes are none, unknown, or not neighbours in the order pipe, data, tensor, where data is
                expert_data and expert, in this order.
        """
        first, last = self._span(mesh_axes)
        stride = self.num(*_FINE[last + 1 :])
        return Groups(num_ranks=self.num_ranks, size=self.num(*_FINE[first : last + 1]), stride=stride)

    def neighbours(self, mesh_axis: MeshAxis, num: int) -> Groups:
        """Return the groups of ``num`` neighbours along a mesh axis, whose size ``num`` divides.

        >>> list(Mesh(tensor=8).neighbours("tensor", 2))
        [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
        """
        return Groups(num_ranks=self.num_ranks, size=num, stride=self.groups(mesh_axis).stride)

    def stage(self, stage: int) -> range:
        """Return the ranks of a pipeline stage.

        >>> Mesh(pipe=2, data=2, tensor=4).stage(1)
        range(8, 16)
        """
        if not 0 <= stage < self.pipe:
            msg = f"stage {stage} is not on {self}"
            raise IndexError(msg)
        return self.groups("data", "tensor")[stage]

    def _num(self, mesh_axis: MeshAxis) -> int:
        _check(mesh_axis)
        return getattr(self, mesh_axis)

    def _span(self, mesh_axes: Sequence[MeshAxis]) -> tuple[int, int]:
        fine: list[MeshAxis] = []
        for mesh_axis in mesh_axes:
            _check(mesh_axis)
            fine += _FINE[1:3] if mesh_axis == "data" else (mesh_axis,)
        places = sorted(map(_FINE.index, fine))
        if not places or places != list(range(places[0], places[-1] + 1)):
            msg = f"mesh axes {tuple(mesh_axes)} are not neighbours in the order {', '.join(MESH_AXES)}"
            raise ValueError(msg)
        return places[0], places[-1]

    def __str__(self) -> str:
        expert = f" expert={self.expert}" if self.expert > 1 else ""
        return "mesh " + " ".join(f"{mesh_axis}={self.num(mesh_axis)}" for mesh_axis in MESH_AXES) + expert


@frozen
class Coordinate:
    """Where a rank stands on its mesh.

    >>> here = Mesh(data=2, tensor=4).coordinate(6)
    >>> here.index("tensor"), here.group("tensor"), here.rank
    (2, range(4, 8), 6)
    """

    pipe: int
    data: int
    tensor: int
    mesh: Mesh = field(repr=False)

    def __attrs_post_init__(self) -> None:
        for mesh_axis in MESH_AXES:
            index, num = self.index(mesh_axis), self.mesh.num(mesh_axis)
            if not 0 <= index < num:
                msg = f"coordinate {mesh_axis}={index} is not on {self.mesh}"
                raise ValueError(msg)

    @property
    def rank(self) -> int:
        """The rank that stands here."""
        return self.mesh.rank(self)

    def index(self, mesh_axis: MeshAxis) -> int:
        """Return the place along one mesh axis, 0 to its size less one."""
        _check(mesh_axis)
        match mesh_axis:
            case "expert":
                return self.data % self.mesh.expert
            case "expert_data":
                return self.data // self.mesh.expert
            case _:
                return getattr(self, mesh_axis)

    def group(self, *mesh_axes: MeshAxis) -> range:
        """Return the ranks that differ from this one only along ``mesh_axes``, this one among them."""
        groups = self.mesh.groups(*mesh_axes)
        return groups.of(self.rank)

    def is_first(self, *mesh_axes: MeshAxis) -> bool:
        """Tell whether this is place 0 along every one of ``mesh_axes``."""
        return all(self.index(mesh_axis) == 0 for mesh_axis in mesh_axes)


@frozen
class Groups(Sequence[range]):
    """All groups along some mesh axes, as a sequence that computes its members when asked.

    >>> Mesh(pipe=4, data=256, tensor=16).groups("data")[17]
    range(4097, 8178, 16)
    >>> len(Mesh(pipe=4, data=256, tensor=16).groups("data"))
    64
    """

    num_ranks: int
    size: int
    stride: int

    def __len__(self) -> int:
        return self.num_ranks // self.size

    @overload
    def __getitem__(self, index: int) -> range: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[range]: ...
    def __getitem__(self, index: int | slice) -> range | Sequence[range]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            msg = f"group {index} of {len(self)}"
            raise IndexError(msg)
        block, offset = divmod(index % len(self), self.stride)
        start = block * self.size * self.stride + offset
        return range(start, start + self.size * self.stride - self.stride + 1, self.stride)

    def of(self, rank: int) -> range:
        """Return the group that ``rank`` belongs to."""
        if not 0 <= rank < self.num_ranks:
            msg = f"rank {rank} is in no group of {self.num_ranks} ranks"
            raise IndexError(msg)
        block, offset = divmod(rank, self.size * self.stride)
        return self[block * self.stride + offset % self.stride]


def _check(mesh_axis: str) -> None:
    if mesh_axis not in _NAMES:
        msg = f"mesh axis {mesh_axis!r} is unknown; there are {', '.join(_NAMES)}"
        raise ValueError(msg)


assert tuple(fields_dict(Mesh)) == (*MESH_AXES, "expert")
