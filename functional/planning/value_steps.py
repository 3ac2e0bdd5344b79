"""The road that values take: from units that are made to steps that every rank follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from attrs import Factory, define

from ...specs.mesh import BATCH_AXES, STAGE_AXES, unsplit
from ...specs.program import InitProgram
from ...specs.source import Loaded, Made, ModuleValues, OwnValues
from ...specs.steps import (
    Allocate,
    Broadcast,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    LoadShard,
    Place,
    Scatter,
    SendCopy,
    Slice,
    Step,
    TakeShard,
    TakeWhole,
)

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate, Mesh, MeshAxis
    from ...specs.param import ParamSpec
    from ..init.units import Unit

Strategy = Literal["local", "scatter", "broadcast"]
"""How values get to the ranks that keep them: made there, or by one rank that sends them."""

BUCKET_BYTES = 32 * 2**20
"""Small tensors travel together until they fill this; a larger one travels alone."""


def route(
    units: Iterable[tuple[Unit | None, tuple[ParamSpec, ...]]],
    mesh: Mesh,
    stage: int,
    strategy: Literal["scatter", "broadcast"],
) -> Iterator[Step]:
    """Iterate over the steps that make, send, slice and place the tensors of one stage.

    Args:
        units: What is made together, with those of its tensors that the stage owns; None for init programs and for values
            that the module already has.
        mesh: The ranks.
        stage: Pipeline stage.
        strategy: ``scatter`` (each rank gets its part only) or ``broadcast`` (each gets all, then slices).
    """
    road = _Road(mesh.coordinate(mesh.stage(stage).start), stage, strategy)
    for unit, specs in units:
        if unit is not None:
            own = tuple(path for path in unit.paths if any(path in spec.paths for spec in specs))
            lent = tuple(path for path in unit.paths if path not in own)
            yield Generate(stage, own, unit.calls, (*unit.scratch, *lent), unit.paths[0])
        for spec in specs:
            yield from road.add(spec)
    yield from road.flush()


def born_sharded(specs: Iterable[ParamSpec], stage: int) -> Iterator[Step]:
    """Iterate over the steps for tensors of which every rank evaluates its own part."""
    if paths := tuple(spec.path for spec in specs):
        yield EvaluateShard(stage, paths)
        yield Place(stage, paths)


def local_only(specs: Iterable[ParamSpec], stage: int) -> Iterator[Step]:
    """Iterate over the steps for tensors that nobody sends: each rank has its own values, or none."""
    chosen = tuple(specs)
    own = tuple(spec.path for spec in chosen if isinstance(spec.source, OwnValues))
    bare = tuple(spec.path for spec in chosen if not isinstance(spec.source, OwnValues))
    if own:
        yield TakeShard(stage, own)
    if bare:
        yield Allocate(stage, bare)
    if chosen:
        yield Place(stage, own + bare)


def from_files(specs: Iterable[ParamSpec], mesh: Mesh, stage: int, *, dedupe: bool) -> Iterator[Step]:
    """Iterate over the steps for tensors that lie in files: every rank reads its own part.

    Args:
        specs: The tensors.
        mesh: The ranks.
        stage: Pipeline stage.
        dedupe: Whether of the ranks that hold the same part along ``data`` the first reads it, and broadcasts it.
    """
    alike: dict[tuple[str, str, tuple[MeshAxis, ...]], list[ParamSpec]] = {}
    for spec in specs:
        assert isinstance(spec.source, Loaded), "others have steps of their own"
        alike.setdefault((spec.source.dtype, spec.dtype, _sharing(spec, mesh) if dedupe else ()), []).append(spec)
    for (stored_dtype, _, over), found in alike.items():
        found.sort(key=_where)
        for together in _buckets(found) if over else [found]:
            paths = tuple(spec.path for spec in together)
            yield LoadShard(stage, paths, stored_dtype, over)
            if over:
                yield Broadcast(stage, paths, over)
            yield Place(stage, paths)


def _sharing(spec: ParamSpec, mesh: Mesh) -> tuple[MeshAxis, ...]:
    """Return the mesh axes that carry batches along which ranks hold the same part of a tensor."""
    return _longer_than_one(mesh, unsplit(BATCH_AXES, spec.mesh_axes(mesh.coordinate(0))))


def _where(spec: ParamSpec) -> tuple[str, int]:
    """Return where a tensor begins: file and byte."""
    assert isinstance(spec.source, Loaded), "others lie in no file"
    return min((part.stored.file, part.stored.offset) for part in spec.source.parts)


def _buckets(specs: Iterable[ParamSpec]) -> Iterator[list[ParamSpec]]:
    """Put neighbours together until they fill a bucket; a larger tensor is alone."""
    bucket: list[ParamSpec] = []
    for spec in specs:
        if bucket and sum(other.num_bytes for other in bucket) + spec.num_bytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(spec)
    if bucket:
        yield bucket


def copies(spec: ParamSpec, mesh: Mesh) -> tuple[int, ...]:
    """Return the places along ``pipe`` that are sent a tensor by its owner's; init programs are evaluated there instead."""
    return spec.places(mesh)[1:] if isinstance(spec.source, (Made, ModuleValues)) else ()


@define
class _Road:
    """Buckets that fill up: tensors of one dtype that are split over the same mesh axes travel together."""

    first: Coordinate
    stage: int
    strategy: Literal["scatter", "broadcast"]
    buckets: dict[tuple[str, tuple[MeshAxis, ...]], list[ParamSpec]] = Factory(dict)
    filled: Counter[tuple[str, tuple[MeshAxis, ...]]] = Factory(Counter)

    def add(self, spec: ParamSpec) -> Iterator[Step]:
        if spec.num_bytes >= BUCKET_BYTES:
            yield from self.send([spec], spec.mesh_axes(self.first))
            return
        key = (spec.dtype, spec.mesh_axes(self.first))
        if self.filled[key] + spec.num_bytes > BUCKET_BYTES:
            yield from self.send(self.buckets.pop(key), key[1])
            self.filled[key] = 0
        self.buckets.setdefault(key, []).append(spec)
        self.filled[key] += spec.num_bytes

    def flush(self) -> Iterator[Step]:
        for (_, split), bucket in self.buckets.items():
            yield from self.send(bucket, split)
        self.buckets.clear()

    def send(self, specs: list[ParamSpec], split: tuple[MeshAxis, ...]) -> Iterator[Step]:
        paths = tuple(spec.path for spec in specs)
        if taken := tuple(spec.path for spec in specs if isinstance(spec.source, ModuleValues)):
            yield TakeWhole(self.stage, taken)
        if evaluated := tuple(spec.path for spec in specs if isinstance(spec.source, InitProgram)):
            yield EvaluateWhole(self.stage, evaluated)
        mesh = self.first.mesh
        several, rest = _longer_than_one(mesh, STAGE_AXES), _longer_than_one(mesh, unsplit(STAGE_AXES, split))
        # a scatter over 'expert' alone would leave others along 'tensor' for which no single group has a first rank
        if self.strategy == "scatter" and split and all(mesh.has_groups(*axes) for axes in (split, rest) if axes):
            yield Scatter(self.stage, paths, split)
            if rest:
                yield Broadcast(self.stage, paths, rest)
        else:
            if several:
                yield Broadcast(self.stage, paths, several)
            if split:
                yield Slice(self.stage, paths)
        copied = [(spec, to) for spec in specs for to in copies(spec, mesh)]
        yield from (SendCopy(self.stage, to, (spec.path,)) for spec, to in copied)
        yield Place(self.stage, paths)
        yield from (Place(to, (spec.path,)) for spec, to in copied)


def _longer_than_one(mesh: Mesh, mesh_axes: tuple[MeshAxis, ...]) -> tuple[MeshAxis, ...]:
    return tuple(mesh_axis for mesh_axis in mesh_axes if mesh.num(mesh_axis) > 1)
