"""The device mesh: the table of its axes, and how ranks are numbered along them, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from attrs import Attribute, field, fields, fields_dict, frozen
from attrs.validators import ge

from .json_values import check_integer


def _axis(*, within: str = "", holds_stages: bool = False, carries_batches: bool = False) -> int:
    """Return a field of :class:`Mesh`: the number of ranks along a mesh axis, with facts of the axis.

    Args:
        within: The mesh axis that it is a factor of, and along which its ranks are neighbours; empty if it counts ranks.
        holds_stages: Whether ranks along it hold different pipeline stages; along all else they share a stage's tensors.
        carries_batches: Whether ranks along it see different batches.
    """
    facts = {"within": within, "holds_stages": holds_stages, "carries_batches": carries_batches}
    return field(default=1, validator=[check_integer, ge(1)], metadata=facts)


@frozen
class Mesh:
    """Ranks arranged along named axes; the last axis varies fastest.

    The rank of coordinate (p, d, t) is ``(p * data + d) * tensor + t``. Experts are spread over ``expert`` neighbours along
    ``data``, which see different batches too: place d is place ``d % expert`` among them, and the ``data / expert`` ranks
    at place ``d // expert`` along ``expert_data`` hold the same experts.

    The fields are the table of mesh axes, outermost first. An axis is added by a single line here: all code asks the
    constants and functions of this module for names of axes and their roles.

    Args:
        pipe: Number of pipeline stages.
        data: Number of replicas that see different batches.
        tensor: Number of ranks that share a layer.
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

    pipe: int = _axis(holds_stages=True)
    data: int = _axis(carries_batches=True)
    tensor: int = _axis()
    expert: int = _axis(within="data")

    def __attrs_post_init__(self) -> None:
        for part, whole in _WITHIN.items():
            size, num = getattr(self, whole), getattr(self, part)
            if size % num:
                msg = f"{part}={num} is carved out of {whole}={size}, and does not divide it"
                raise ValueError(msg)

    @property
    def expert_data(self) -> int:
        """The number of ranks along ``data`` that hold the same experts."""
        return self.num("expert_data")

    @property
    def num_ranks(self) -> int:
        """The number of ranks: pipe x data x tensor."""
        return self.num(*MESH_AXES)

    def num(self, *mesh_axes: MeshAxis) -> int:
        """Return the number of ranks along some mesh axes together.

        >>> Mesh(data=2, tensor=4).num("data", "tensor")
        8
        """
        count = 1
        for mesh_axis in mesh_axes:
            _check(mesh_axis)
            whole, part = _QUOTIENTS.get(mesh_axis, (mesh_axis, ""))
            count *= getattr(self, whole) // (getattr(self, part) if part else 1)
        return count

    def coordinate(self, rank: int) -> Coordinate:
        """Return where ``rank`` stands; raise IndexError for a rank outside the mesh."""
        if not 0 <= rank < self.num_ranks:
            msg = f"rank {rank} is not on {self}, whose ranks are 0 to {self.num_ranks - 1}"
            raise IndexError(msg)
        places: dict[str, int] = {}
        for mesh_axis in reversed(MESH_AXES):
            rank, places[mesh_axis] = divmod(rank, getattr(self, mesh_axis))
        return Coordinate(**places, mesh=self)

    def at(self, **places: int) -> Coordinate:
        """Return the coordinate at given places along mesh axes, and at place 0 along the remaining axes.

        Args:
            places: The place along each mesh axis that is named; ``data`` may be named by its factors.

        Raises:
            ValueError: If there is no such place.

        >>> mesh = Mesh(pipe=2, data=4, tensor=2, expert=2)
        >>> mesh.at(pipe=1, tensor=1), mesh.at(expert_data=1, expert=1)
        (Coordinate(pipe=1, data=0, tensor=1), Coordinate(pipe=0, data=3, tensor=0))
        """
        found = dict.fromkeys(MESH_AXES, 0)
        for mesh_axis, place in places.items():
            _check(mesh_axis)
            whole, part = _QUOTIENTS.get(mesh_axis, (_WITHIN.get(mesh_axis, mesh_axis), ""))
            found[whole] += place * (getattr(self, part) if part else 1)
        here = Coordinate(**found, mesh=self)
        if any(here.index(mesh_axis) != place for mesh_axis, place in places.items()):
            msg = f"{', '.join(f'{mesh_axis}={place}' for mesh_axis, place in places.items())} is no place on {self}"
            raise ValueError(msg)
        return here

    def rank(self, coordinate: Coordinate) -> int:
        """Return the rank that stands at ``coordinate``: the inverse of :meth:`coordinate`."""
        if coordinate.mesh != self:
            msg = f"{coordinate} stands on {coordinate.mesh}, not on {self}"
            raise ValueError(msg)
        rank = 0
        for mesh_axis in MESH_AXES:
            rank = rank * getattr(self, mesh_axis) + getattr(coordinate, mesh_axis)
        return rank

    def groups(self, *mesh_axes: MeshAxis) -> Groups:
        """Return the groups of ranks that differ only along ``mesh_axes``, in the order of their first ranks.

        Raises:
            ValueError: If the axes are none, unknown, or not neighbours in the order of ``MESH_AXES`` with ``data`` as
                expert_data and expert, in this order; axes of a stage with a single rank may be left out in between.
        """
        first, last = self._span(mesh_axes)
        return Groups(self.num_ranks, size=self.num(*_FINE[first : last + 1]), stride=self.num(*_FINE[last + 1 :]))

    def has_groups(self, *mesh_axes: MeshAxis) -> bool:
        """Tell whether there are groups along some mesh axes: whether they are neighbours."""
        try:
            self._span(mesh_axes)
        except ValueError:
            return False
        return True

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
        return self.groups(*STAGE_AXES)[stage]

    def _span(self, mesh_axes: Sequence[MeshAxis]) -> tuple[int, int]:
        for mesh_axis in mesh_axes:
            _check(mesh_axis)
        places = sorted(map(_FINE.index, factors(*mesh_axes)))
        gaps = [_FINE[place] for place in range(places[0], places[-1]) if place not in places] if places else []
        is_of_one_stage = all(mesh_axis not in mesh_axes for mesh_axis in MESH_AXES if mesh_axis not in STAGE_AXES)
        if not places or len(set(places)) < len(places) or (gaps and not (is_of_one_stage and self.num(*gaps) == 1)):
            msg = f"mesh axes {tuple(mesh_axes)} are not neighbours in the order {', '.join(MESH_AXES)}"
            raise ValueError(msg)
        return places[0], places[-1]

    def __str__(self) -> str:
        parts = [part for part in _WITHIN if getattr(self, part) > 1]
        return "mesh " + " ".join(f"{mesh_axis}={getattr(self, mesh_axis)}" for mesh_axis in (*MESH_AXES, *parts))


_WITHIN: dict[str, str] = {axis.name: within for axis in fields(Mesh) if (within := axis.metadata["within"])}
_QUOTIENTS = {f"{part}_{whole}": (whole, part) for part, whole in _WITHIN.items()}
_FACTORS = {whole: (outer, part) for outer, (whole, part) in _QUOTIENTS.items()}

MESH_AXES: tuple[MeshAxis, ...] = tuple(axis.name for axis in fields(Mesh) if axis.name not in _WITHIN)
"""The mesh axes that count ranks, outermost first, as in DeepSpeed's ``PipeModelDataParallelTopology``."""

STAGE_AXES: tuple[MeshAxis, ...] = tuple(m for m in MESH_AXES if not fields_dict(Mesh)[m].metadata["holds_stages"])
"""The mesh axes along which the ranks of a stage stand."""

BATCH_AXES: tuple[MeshAxis, ...] = tuple(m for m in MESH_AXES if fields_dict(Mesh)[m].metadata["carries_batches"])
"""The mesh axes whose ranks see different batches: gradients are averaged over them."""

MODEL_AXES: tuple[MeshAxis, ...] = tuple(m for m in STAGE_AXES if m not in BATCH_AXES)
"""The mesh axes of a stage whose ranks see the same batch, and share the work on it."""

AXIS_NAMES: tuple[MeshAxis, ...] = tuple(name for m in MESH_AXES for name in (m, *_FACTORS.get(m, ())))
"""The names of all mesh axes and of their factors, in mesh order."""

SPLIT_AXES: tuple[MeshAxis, ...] = tuple(m for m in AXIS_NAMES if m in (*STAGE_AXES, *_WITHIN))
"""The mesh axes over which a tensor can be split, in mesh order."""

_FINE: tuple[MeshAxis, ...] = tuple(m for m in AXIS_NAMES if m not in _FACTORS)

if TYPE_CHECKING:
    MeshAxis = str
else:
    MeshAxis = Literal[AXIS_NAMES]
"""A named dimension of the mesh. ``data`` is ``expert_data`` times ``expert``."""


def factors(*mesh_axes: MeshAxis) -> tuple[MeshAxis, ...]:
    """Return some mesh axes with each in its factors, if it has any.

    >>> factors("data", "tensor")
    ('expert_data', 'expert', 'tensor')
    """
    return tuple(factor for mesh_axis in mesh_axes for factor in _FACTORS.get(mesh_axis, (mesh_axis,)))


def unsplit(mesh_axes: Iterable[MeshAxis], split: Iterable[MeshAxis]) -> tuple[MeshAxis, ...]:
    """Return the mesh axes, or factors of them, along which ranks hold the same part of a tensor.

    Args:
        mesh_axes: The mesh axes that are asked for.
        split: The mesh axes that split the tensor.

    >>> unsplit(("data", "tensor"), split=("expert",)), unsplit(("data", "tensor"), split=("data",))
    (('expert_data', 'tensor'), ('tensor',))
    """
    taken = {*factors(*split)}
    found: list[MeshAxis] = []
    for mesh_axis in mesh_axes:
        rest = [factor for factor in factors(mesh_axis) if factor not in taken]
        found += [mesh_axis] if len(rest) == len(factors(mesh_axis)) else rest
    return tuple(found)


def whole_of(mesh_axis: MeshAxis) -> MeshAxis:
    """Return the mesh axis that another is a factor of; itself if it counts ranks.

    >>> whole_of("expert"), whole_of("expert_data"), whole_of("tensor")
    ('data', 'data', 'tensor')
    """
    return next((whole for whole, parts in _FACTORS.items() if mesh_axis in parts), mesh_axis)


def in_mesh_order(mesh_axes: Iterable[MeshAxis]) -> list[int]:
    """Return a key by which sets of mesh axes are sorted: the place of each in the mesh, from the outermost.

    >>> sorted([("tensor",), ("data", "tensor"), ("pipe",)], key=in_mesh_order)
    [('pipe',), ('data', 'tensor'), ('tensor',)]
    """
    return list(map(AXIS_NAMES.index, mesh_axes))


def field_for_each(
    *mesh_axes: MeshAxis, of: Any, first: bool
) -> Callable[[type, list[Attribute[Any]]], list[Attribute[Any]]]:
    """Return a ``field_transformer`` that gives an attrs class a field for each of some mesh axes.

    Args:
        mesh_axes: Names of the fields.
        of: Their type.
        first: Whether they stand before the fields of the class itself, or after them.
    """

    def transform(_: type, own: list[Attribute[Any]]) -> list[Attribute[Any]]:
        made = [own[0].evolve(name=name, alias=name, type=of, repr=True) for name in mesh_axes]
        return [*made, *own] if first else [*own, *made]

    return transform


@frozen(field_transformer=field_for_each(*MESH_AXES, of=int, first=True))
class Coordinate:
    """Where a rank stands on its mesh: its place along each mesh axis that counts ranks, from 0.

    >>> here = Mesh(data=2, tensor=4).coordinate(6)
    >>> here.index("tensor"), here.group("tensor"), here.rank
    (2, range(4, 8), 6)
    """

    mesh: Mesh = field(repr=False)

    if TYPE_CHECKING:  # the places are fields too

        def __init__(self, *places: int, mesh: Mesh, **named: int) -> None: ...
        def __getattr__(self, mesh_axis: str) -> int: ...

    def __attrs_post_init__(self) -> None:
        for mesh_axis in MESH_AXES:
            index = getattr(self, mesh_axis)
            if not 0 <= index < getattr(self.mesh, mesh_axis):
                msg = f"coordinate {mesh_axis}={index} is not on {self.mesh}"
                raise ValueError(msg)

    @property
    def rank(self) -> int:
        """The rank that stands here."""
        return self.mesh.rank(self)

    def index(self, mesh_axis: MeshAxis) -> int:
        """Return the place along a mesh axis, from 0."""
        _check(mesh_axis)
        if mesh_axis in _QUOTIENTS:
            whole, part = _QUOTIENTS[mesh_axis]
            return getattr(self, whole) // getattr(self.mesh, part)
        if mesh_axis in _WITHIN:
            return getattr(self, _WITHIN[mesh_axis]) % getattr(self.mesh, mesh_axis)
        return getattr(self, mesh_axis)

    def group(self, *mesh_axes: MeshAxis) -> range:
        """Return the ranks that differ from this coordinate only along ``mesh_axes``, its own rank among them."""
        groups = self.mesh.groups(*mesh_axes)
        return groups.of(self.rank)

    def is_first(self, *mesh_axes: MeshAxis) -> bool:
        """Tell whether this is place 0 along all of ``mesh_axes``."""
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
    if mesh_axis not in AXIS_NAMES:
        msg = f"mesh axis {mesh_axis!r} is unknown; there are {', '.join(AXIS_NAMES)}"
        raise ValueError(msg)
