"""The steps that give tensors their values: made, read or taken, then sent, sliced, placed and tied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from attrs import Factory, define

from ...specs.mesh import BATCH_AXES, STAGE_AXES, unsplit
from ...specs.program import InitProgram
from ...specs.source import Loaded, Made, ModuleValues, OwnValues, Uninitialised
from ...specs.steps import (
    Allocate,
    Broadcast,
    CheckLoaded,
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
    Tie,
)

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate, Mesh, MeshAxis
    from ...specs.param import ParamSpec
    from ...specs.tree import SpecTree
    from ..init.units import Unit

Strategy = Literal["local", "scatter", "broadcast"]
"""How values get to the ranks that keep them: made there, or sent by the rank that made them."""

BUCKET_BYTES = 32 * 2**20
"""Small tensors travel together until they fill a bucket of this size; a larger tensor travels alone."""


def value_steps(mesh: Mesh, tree: SpecTree, units: Sequence[Unit], strategy: Strategy, *, dedupe: bool) -> Iterator[Step]:
    """Iterate over the steps that give all tensors their values, place by place along ``pipe``.

    Args:
        mesh: The ranks.
        tree: The tensors, with their sources.
        units: Runs of init code, and the tensors that each makes.
        strategy: How the values of init programs and of init code reach the ranks.
        dedupe: Whether only the first of the ranks along ``data`` that hold the same part reads it from a file, and
            broadcasts it.
    """
    for stage in range(mesh.pipe):
        held = [spec for spec in tree.values() if stage in spec.places(mesh)]
        evaluated = [spec.path for spec in held if isinstance(spec.source, InitProgram)]
        if strategy == "local" and evaluated:
            yield EvaluateShard(stage, tuple(evaluated))
            yield Place(stage, tuple(evaluated))
        yield from _made_whole(held, mesh, tree, units, stage, strategy)
        yield from _read([spec for spec in held if isinstance(spec.source, Loaded)], mesh, stage, dedupe=dedupe)
        yield from _kept_or_bare([spec for spec in held if isinstance(spec.source, (OwnValues, Uninitialised))], stage)
    sources = [spec.source for spec in tree.values()]
    if any(part.stored.sum is not None for source in sources if isinstance(source, Loaded) for part in source.parts):
        yield CheckLoaded()
    yield from (Tie(at, spec.path, spec.tie) for spec in tree.values() if spec.tie for at in spec.places(mesh))


def _made_whole(
    held: Sequence[ParamSpec], mesh: Mesh, tree: SpecTree, units: Sequence[Unit], stage: int, strategy: Strategy
) -> Iterator[Step]:
    """Iterate over the steps for tensors that the first rank of a stage makes whole, and sends."""
    owned = {spec.path for spec in held if spec.places(mesh)[0] == stage}
    made: list[tuple[Unit | None, tuple[ParamSpec, ...]]] = [
        (unit, own) for unit in units if (own := tuple(tree[path] for path in unit.paths if tree[path].path in owned))
    ]
    made += [(None, (spec,)) for spec in held if isinstance(spec.source, ModuleValues) and spec.path in owned]
    if strategy != "local":
        made += [(None, (spec,)) for spec in held if isinstance(spec.source, InitProgram)]
    order = {path: number for number, path in enumerate(tree)}
    made.sort(key=lambda item: order[item[1][0].path])
    sender = _Sender(mesh.coordinate(mesh.stage(stage).start), stage, scatters=strategy != "broadcast")
    for unit, specs in made:
        if unit is not None:
            own = tuple(path for path in unit.paths if any(path in spec.paths for spec in specs))
            lent = tuple(path for path in unit.paths if path not in own)
            yield Generate(stage, own, unit.calls, (*unit.scratch, *lent), unit.paths[0])
        for spec in specs:
            yield from sender.add(spec)
    yield from sender.flush()


def _read(specs: Sequence[ParamSpec], mesh: Mesh, stage: int, *, dedupe: bool) -> Iterator[Step]:
    """Iterate over the steps for tensors that lie in files: every rank reads its own part, in the order of the files."""
    groups: dict[tuple[str, str, tuple[MeshAxis, ...]], list[ParamSpec]] = {}
    for spec in specs:
        assert isinstance(spec.source, Loaded), "the caller has chosen them"
        over = _axes_with_copies(spec, mesh) if dedupe else ()
        groups.setdefault((spec.source.dtype, spec.dtype, over), []).append(spec)
    for (stored_dtype, _, over), group in groups.items():
        group.sort(key=_first_byte)
        for bucket in _buckets(group) if over else [group]:
            paths = tuple(spec.path for spec in bucket)
            yield LoadShard(stage, paths, stored_dtype, over)
            if over:
                yield Broadcast(stage, paths, over)
            yield Place(stage, paths)


def _axes_with_copies(spec: ParamSpec, mesh: Mesh) -> tuple[MeshAxis, ...]:
    """Return the mesh axes that carry batches along which ranks hold the same part of a tensor."""
    return _longer_than_one(mesh, unsplit(BATCH_AXES, spec.mesh_axes(mesh.coordinate(0))))


def _first_byte(spec: ParamSpec) -> tuple[str, int]:
    """Return the file and the byte at which a tensor begins."""
    assert isinstance(spec.source, Loaded), "the caller has chosen it"
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


def _kept_or_bare(specs: Sequence[ParamSpec], stage: int) -> Iterator[Step]:
    """Iterate over the steps for tensors that are neither made nor sent: each rank keeps its own values, or has none."""
    own = tuple(spec.path for spec in specs if isinstance(spec.source, OwnValues))
    bare = tuple(spec.path for spec in specs if not isinstance(spec.source, OwnValues))
    if own:
        yield TakeShard(stage, own)
    if bare:
        yield Allocate(stage, bare)
    if specs:
        yield Place(stage, own + bare)


@define
class _Sender:
    """Sends whole tensors in buckets: tensors of equal dtype that are split over the same mesh axes travel together.

    Args:
        first: The rank that makes the tensors.
        stage: Its place along ``pipe``.
        scatters: Whether each rank is sent its part alone where possible; else each is sent the whole, and slices it.
        buckets: Tensors that wait for their bucket to fill, by dtype and mesh axes.
        filled: Bytes in each bucket.
    """

    first: Coordinate
    stage: int
    scatters: bool
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
        rest = _longer_than_one(mesh, unsplit(STAGE_AXES, split))
        # after a scatter over 'expert' alone, ranks along 'expert_data' and 'tensor' have no common group to pass parts on
        if self.scatters and split and all(mesh.has_groups(*axes) for axes in (split, rest) if axes):
            yield Scatter(self.stage, paths, split)
            if rest:
                yield Broadcast(self.stage, paths, rest)
        else:
            if everyone := _longer_than_one(mesh, STAGE_AXES):
                yield Broadcast(self.stage, paths, everyone)
            if split:
                yield Slice(self.stage, paths)
        # other stages that hold a tensor are sent a copy; init programs they evaluate themselves
        sent = [spec for spec in specs if isinstance(spec.source, (Made, ModuleValues))]
        copied = [(spec, to) for spec in sent for to in spec.places(mesh)[1:]]
        yield from (SendCopy(self.stage, to, (spec.path,)) for spec, to in copied)
        yield Place(self.stage, paths)
        yield from (Place(to, (spec.path,)) for spec, to in copied)


def _longer_than_one(mesh: Mesh, mesh_axes: tuple[MeshAxis, ...]) -> tuple[MeshAxis, ...]:
    return tuple(mesh_axis for mesh_axis in mesh_axes if mesh.num(mesh_axis) > 1)
