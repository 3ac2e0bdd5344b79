"""The room of effects: real tensors, real messages."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, product
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from attrs import Factory, define
from torch import Tensor, nn

from ...specs.errors import PlanError
from ...specs.index import index_shape, whole_index
from ...specs.ownership import held_first
from ...specs.program import InitProgram
from ...specs.source import Materialised, ModuleCall, ModuleValues, OwnValues
from ...specs.stored import Folder, Part
from ..checkpoints.byte_ranges import staging_bytes, stored_parts, take, take_all
from ..checkpoints.checksum import MODULUS
from ..checkpoints.expected_checksums import differing, known_sums
from ..checkpoints.formats.manifest import read_manifest
from ..checkpoints.formats.rank_file import damaged, read_rank_file, wrong_tensors
from ..checkpoints.reader import Files, Reading, read_all
from ..dialects import find_dialect
from ..dialects.handover import Handover, Wrapped
from ..init.calls import run_call
from ..init.constants import one_thread
from ..init.evaluate import Job, evaluate
from ..layout.apply import Local, apply_layout
from ..layout.collectives import SyncGroup
from ..layout.device_mesh import of_groups
from ..layout.hooks import group_name
from ..model.copy import get_tensor, like, module_of, put_tensor, tied
from ..model.rng_state import derive_seed, own_generators
from ..pipeline.build_stages import make_stage
from .dry_run import AGREEMENT_BYTES
from .ledger import Ledger
from .world import agree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from ...specs.mesh import Coordinate, MeshAxis
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.shard import Interval
    from ...specs.source import Call
    from ...specs.steps import LayoutStep
    from ..pipeline.partition import Partition
    from .resolve import Alias, Distribute, Exchange, KeepStages, Make, OpenGroups, OpenTieGroups, Piece, SumGradients

Key = TypeVar("Key")


@define
class TorchEffects:
    """Fills a copy of the model with real tensors of one rank.

    Args:
        coordinate: Where the rank stands.
        device: Where its tensors are allocated.
        original: The user's module: read where its values are asked for, never written.
        module: The copy, with its tensors on meta; it is filled.
        callables: The user's functions by name.
        optimizer: Function from parameters to an optimizer, for the dialect.
        loss_fn: Function for the dialect.
        parts: The graphs of the pipeline's stages; None without a pipeline.
        ledger: What was allocated and sent.
        groups: Process groups of this rank by mesh axes.
        sharing: Groups of neighbours that hold parts in common, by name.
        tie_groups: Those that join stages, by the stages' places along ``pipe``.
        tied: Tensors whose gradients are summed over stages, with their places.
        sums: Sums of what was read from files and counts here, by tensor and number among what it is made of.
        modules: What this rank runs: its stages, or the whole module.
        device_mesh: The device mesh of this rank's DTensors; None if it has none.
        made_optimizer: What ``optimizer`` gave.
        wrapped: What the dialect gave.
    """

    coordinate: Coordinate
    device: torch.device
    original: nn.Module
    module: nn.Module
    callables: Mapping[str, Any]
    optimizer: Callable[..., Any] | None = None
    loss_fn: Callable[..., Any] | None = None
    parts: Partition | None = None
    ledger: Ledger = Factory(Ledger)
    groups: dict[tuple[MeshAxis, ...], dist.ProcessGroup] = Factory(dict)
    sharing: dict[str, SyncGroup] = Factory(dict)
    tie_groups: dict[tuple[int, ...], dist.ProcessGroup] = Factory(dict)
    tied: dict[str, tuple[int, ...]] = Factory(dict)
    sums: dict[tuple[str, int], int] = Factory(dict)
    modules: tuple[nn.Module, ...] = Factory(lambda self: (self.module,), takes_self=True)
    device_mesh: DeviceMesh | None = None
    made_optimizer: Any = None
    wrapped: Wrapped | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return self.coordinate.rank

    def agree(self, plan: Plan, error: BaseException | None) -> None:
        agree(plan, error, self.device)
        if plan.mesh.num_ranks > 1:
            self.ledger.call("all_gather", (), range(plan.mesh.num_ranks), AGREEMENT_BYTES)

    def open_groups(self, work: OpenGroups) -> None:
        for mesh_axes in work.over:
            for ranks in self.coordinate.mesh.groups(*mesh_axes):
                group = dist.new_group(list(ranks))
                self.ledger.num_groups += 1
                if self.rank in ranks:
                    assert isinstance(group, dist.ProcessGroup), "a member gets the group itself"
                    self.groups[mesh_axes] = group
        for mesh_axis, num in work.sharing:
            for ranks in self.coordinate.mesh.neighbours(mesh_axis, num):
                group = dist.new_group(list(ranks))
                self.ledger.num_groups += 1
                if self.rank in ranks:
                    assert isinstance(group, dist.ProcessGroup), "a member gets the group itself"
                    index = self.coordinate.index(mesh_axis) % num
                    self.sharing[group_name(mesh_axis, num)] = SyncGroup(group.group_name, num, index)

    def open_tie_groups(self, work: OpenTieGroups) -> None:
        for between, groups in zip(work.between, work.groups, strict=True):
            for ranks in groups:
                group = dist.new_group(sorted(ranks))
                self.ledger.num_groups += 1
                if self.rank in ranks:
                    assert isinstance(group, dist.ProcessGroup), "a member gets the group itself"
                    self.tie_groups[between] = group

    def make(self, work: Make, seed: int) -> Sequence[Tensor]:
        lent = [path for piece in (*work.pieces, *work.scratch) for path in piece.spec.paths]
        placeholders = {path: get_tensor(self.module, path) for path in lent}
        is_opaque = any(call.opaque for call in work.calls)
        try:
            for piece in work.pieces:
                whole = self.empty(piece.shape, piece.spec.dtype)
                self._lend(piece, whole.fill_(torch.nan) if is_opaque and whole.is_floating_point() else whole)
            for piece in work.scratch:
                has_values = isinstance(piece.spec.source, (ModuleValues, OwnValues))
                self._lend(piece, self.take(piece) if has_values else self.empty(piece.shape, piece.spec.dtype))
            with torch.no_grad(), one_thread(), own_generators(derive_seed(seed, work.key), self.device):
                for call in work.calls:
                    with self._untied(work, call, placeholders):
                        run_call(self.module, call, self.callables)
            made = [self._made(path, piece) for path, piece in zip(work.paths, work.pieces, strict=True)]
        finally:
            for path, placeholder in placeholders.items():
                put_tensor(self.module, path, placeholder)
        gc.collect(1)  # nothing else collects meanwhile, and the user's code may leave cycles that hold whole tensors
        for piece in work.scratch:
            self.ledger.free(piece.num_bytes)
        for piece, tensor in zip(work.pieces, made if is_opaque else [], strict=False):
            if tensor.is_floating_point() and torch.isnan(tensor).any():
                msg = f"{piece.spec}: its init code gave no values to {int(torch.isnan(tensor).sum())} of its elements"
                raise ValueError(msg)
        return made

    def evaluate(self, pieces: Sequence[Piece], seed: int) -> Sequence[Tensor]:
        made = [self.empty(piece.shape, piece.spec.dtype) for piece in pieces]
        parts = [_without_padding(out, piece) for out, piece in zip(made, pieces, strict=True)]
        jobs = (Job(out, _program(p), p.path, p.spec.orig_shape, p.index) for out, p in zip(parts, pieces, strict=True))
        evaluate(jobs, seed)
        return made

    def take(self, piece: Piece) -> Tensor:
        return _copy_part(self.empty(piece.shape, piece.spec.dtype), get_tensor(self.original, piece.path).detach(), piece)

    def load(self, pieces: Sequence[Piece], folder: Folder) -> Sequence[Tensor]:
        made = [self.empty(piece.shape, piece.spec.dtype) for piece in pieces]
        readings: dict[tuple[str, int], Reading] = {}
        for out, piece in zip(made, pieces, strict=True):
            filled, first = _without_padding(out, piece), held_first(piece.spec, self.coordinate)
            for number, part in enumerate(stored_parts(piece.spec)):
                if taken := take(part, piece.index):
                    counted = take(part, first) if first is not None and part.stored.sum is not None else None
                    readings[piece.path, number] = Reading(filled, taken, counted and counted.entries)
        self.sums.update(self._read(readings, folder))
        return made

    def load_own(self, pieces: Sequence[Piece], folder: Folder) -> Sequence[Tensor]:
        made = {piece.path: self.empty(piece.shape, piece.spec.dtype) for piece in pieces}
        own, file, tensors = read_rank_file(folder.path, self.rank, _written_for(pieces[0]))
        if problems := wrong_tensors(file.name, [(p.path, p.spec.dtype, p.shape) for p in pieces], tensors):
            raise PlanError(problems)
        readings = {
            path: Reading(out, taken, taken.entries)
            for path, out in made.items()
            for taken in take_all([Part.whole(tensors[path])], whole_index(tuple(out.shape)))
        }
        sums = self._read(readings, Folder(folder.path, (file,)))
        if problems := damaged(file.name, own, sums):
            raise PlanError(problems)
        self.sums.update(own.loaded)
        return [*made.values()]

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        known = known_sums(plan.tree)
        own = [sum(self.sums.get(part, 0) for part in one.counting) for one in known.values()]
        words = torch.tensor([*map(_signed, own), int(failed)], dtype=torch.int64, device=self.device)
        if plan.mesh.num_ranks > 1:
            dist.all_reduce(words)
            self.ledger.call("all_reduce", (), range(plan.mesh.num_ranks), words.nbytes)
        *sums, num_failed = words.tolist()
        found = {stored: word % MODULUS for stored, word in zip(known, sums, strict=True)}
        if not num_failed and any(found[stored] != one.sum for stored, one in known.items()):
            raise PlanError(list(differing(known, found, _sums_now(plan))))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return self._own(torch.empty(shape, dtype=getattr(torch, dtype), device=self.device))

    def cut(self, whole: Tensor, piece: Piece) -> Tensor:
        # a copy: a view would keep the storage of the whole alive
        return _copy_part(self.empty(piece.shape, piece.spec.dtype), whole, piece)

    def view(self, whole: Tensor, piece: Piece) -> Tensor:
        assert piece.is_run, "nothing else is a view"
        for axis, ((start, stop),) in enumerate(piece.index):
            whole = whole.narrow(axis, start, stop - start)
        return whole

    def pack(self, tensors: Sequence[tuple[Tensor, Piece | None]], room: int, dtype: str) -> Tensor:
        message, written = self.empty((room,), dtype), 0
        for whole, piece in tensors:
            num = whole.numel() if piece is None else piece.num_elements
            into = message[written : written + num]
            if piece is None:
                into.copy_(whole.reshape(-1))
            else:
                _copy_part(into.view(piece.shape), whole, piece)
            written += num
        message[written:].zero_()
        return message

    def unpack(self, message: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
        sizes = [piece.num_elements for piece in pieces]
        parts = message[: sum(sizes)].split(sizes)
        return [self._own(part.clone().view(piece.shape)) for part, piece in zip(parts, pieces, strict=True)]

    def broadcast(self, message: Tensor, exchange: Exchange) -> None:
        group = self.tie_groups[exchange.between] if exchange.between else self.groups[exchange.mesh_axes]
        dist.broadcast(_bytes(message), src=exchange.group.start, group=group)
        self._note("broadcast", message, exchange)

    def scatter(self, message: Tensor, parts: Sequence[Tensor], exchange: Exchange) -> None:
        sent = [_bytes(part) for part in parts] if exchange.is_root else None
        dist.scatter(_bytes(message), sent, src=exchange.group.start, group=self.groups[exchange.mesh_axes])
        self._note("scatter", message, exchange)

    def free(self, tensor: Tensor) -> None:
        self.ledger.free(tensor.nbytes)

    def install(self, spec: ParamSpec, tensor: Tensor) -> None:
        owner, name = self.module.get_submodule(spec.module), spec.path.rpartition(".")[2]
        before = getattr(owner, name)
        if isinstance(owner, torch.jit.ScriptModule):
            with torch.no_grad():
                before.copy_(tensor)
        else:
            setattr(owner, name, like(before, tensor))
        self.ledger.place(getattr(owner, name).untyped_storage().nbytes())

    def alias(self, work: Alias) -> None:
        first = get_tensor(self.module, work.spec.path)
        for path in work.aliases:
            put_tensor(self.module, path, tied(get_tensor(self.module, path), first))

    def change(self, step: LayoutStep) -> None:
        apply_layout(self.module, step, self._local)

    def keep_stages(self, plan: Plan, work: KeepStages) -> None:
        assert self.parts is not None, "the opening agreement checks it"
        numbers = range(work.place, len(plan.stages), plan.mesh.pipe)
        self.modules = tuple(
            make_stage(plan, self.parts, number, self.module, self._local, self.device) for number in numbers
        )

    def sum_gradients(self, work: SumGradients) -> None:
        self.tied[work.spec.path] = work.between

    def distribute(self, work: Distribute) -> None:
        from ..layout.dtensor import to_dtensors  # importing torch's DTensor takes a second

        groups = [self.groups[mesh_axis,] for mesh_axis in work.mesh_axes]
        self.device_mesh = of_groups(self.coordinate.mesh, work.mesh_axes, groups, self.device.type)
        to_dtensors(self.module, work.specs, self.coordinate.mesh, self.device_mesh)

    def make_optimizer(self) -> None:
        found = [parameter for module in self.modules for parameter in module.parameters()]
        trained = [parameter for parameter in dict.fromkeys(found) if parameter.requires_grad]
        self.made_optimizer = self.optimizer(trained) if self.optimizer else None

    def hand(self, plan: Plan) -> None:
        dialect, _ = find_dialect(plan.target)
        assert dialect is not None, "the opening agreement checks it"
        tied = [
            (self._parameter(path), self.coordinate.pipe == between[0], self.tie_groups[between])
            for path, between in self.tied.items()
        ]
        self.wrapped = dialect.wrap(
            Handover(self.modules, plan, self.device, self.groups, tied, self.made_optimizer, self.loss_fn)
        )

    def _parameter(self, path: str) -> nn.Parameter:
        return get_tensor(self.module, path)  # type: ignore[return-value]  only parameters are trained

    @cached_property
    def _local(self) -> Local:
        """What changes of layout need to know of this rank; the groups are there by then."""
        groups: dict[str, SyncGroup] = {
            mesh_axes[0]: SyncGroup(group.group_name, dist.get_world_size(group), self.coordinate.index(mesh_axes[0]))
            for mesh_axes, group in self.groups.items()
            if len(mesh_axes) == 1
        }
        return Local(self.coordinate, groups | self.sharing, self.callables)

    def _read(self, readings: Mapping[Key, Reading], folder: Folder) -> dict[Key, int]:
        """Read, and return the sum of each reading."""
        staging = staging_bytes(sum(reading.taken.num_bytes for reading in readings.values()))
        self.ledger.allocate(staging)
        with Files(folder) as files:
            sums = read_all([*readings.values()], files)
        self.ledger.free(staging)
        for file, num_bytes in files.num_read.items():
            self.ledger.read(file, num_bytes)
        return dict(zip(readings, sums, strict=True))

    def _own(self, tensor: Tensor) -> Tensor:
        self.ledger.allocate(tensor.nbytes)
        return tensor

    def _lend(self, piece: Piece, tensor: Tensor) -> None:
        first = like(get_tensor(self.module, piece.path), tensor)
        for path in piece.spec.paths:
            put_tensor(self.module, path, tied(get_tensor(self.module, path), first))

    @contextmanager
    def _untied(self, work: Make, call: Call, placeholders: Mapping[str, Tensor]) -> Iterator[None]:
        """Hide a tied tensor from the code of a module that holds it at another path than it is made at."""
        hidden: dict[str, Tensor] = {}
        caller = call.module if isinstance(call, ModuleCall) else None
        for made_at, piece in zip(work.paths, work.pieces, strict=True):
            home = self.module.get_submodule(module_of(made_at))
            for path in piece.spec.tie and piece.spec.paths:
                holder = self.module.get_submodule(module_of(path))
                if module_of(path) == caller and holder is not home:
                    hidden[path] = get_tensor(self.module, path)
                    put_tensor(self.module, path, placeholders[path])
        yield
        for path, tensor in hidden.items():
            put_tensor(self.module, path, tensor)

    def _made(self, path: str, piece: Piece) -> Tensor:
        tensor = get_tensor(self.module, path).detach()
        if tuple(tensor.shape) != piece.shape or tensor.dtype != getattr(torch, piece.spec.dtype):
            msg = f"{piece.spec}: its init code left a tensor of shape {list(tensor.shape)} and dtype {tensor.dtype}"
            raise ValueError(msg)
        tensor = tensor.to(self.device).contiguous()
        # init code may have put a view of something larger in place
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def _note(self, op: str, message: Tensor, exchange: Exchange) -> None:
        self.ledger.call(op, exchange.mesh_axes, exchange.group, message.nbytes)


def _bytes(message: Tensor) -> Tensor:
    """Return a tensor as its bytes: gloo sends neither fp8 nor complex numbers, and wrongly what is not contiguous."""
    assert message.is_contiguous(), "messages are contiguous"
    return message.reshape(-1).view(torch.uint8)


def _signed(number: int) -> int:
    """Return the integer of 64 bits with a sign that is a number modulo 2^64."""
    return (number + MODULUS // 2) % MODULUS - MODULUS // 2


def _sums_now(plan: Plan) -> dict[tuple[str, str], int]:
    """Return the sums that the manifest of the plan's folder has by now."""
    manifest = read_manifest(plan.folder.path) if plan.folder else None
    return {(name, key): found for name, sums in manifest.sums.items() for key, found in sums.items()} if manifest else {}


def _written_for(piece: Piece) -> str:
    """Return the fingerprint of the plan that a rank's file was written for."""
    assert isinstance(piece.spec.source, Materialised), "nothing else lies in the file of a rank's own"
    return piece.spec.source.plan


def _program(piece: Piece) -> InitProgram:
    assert isinstance(piece.spec.source, InitProgram), "only init programs are evaluated"
    return piece.spec.source


def _copy_part(own: Tensor, whole: Tensor, piece: Piece) -> Tensor:
    """Copy the part of a whole tensor that a piece is, interval by interval, into what the rank holds; return that."""
    assert whole.numel() == prod(piece.spec.orig_shape), "a part is cut from a whole tensor"
    filled = _without_padding(own, piece)
    for box in product(*(_with_places(intervals) for intervals in piece.index)):
        taken, into = whole, filled
        for axis, (place, start, stop) in enumerate(box):
            taken, into = taken.narrow(axis, start, stop - start), into.narrow(axis, place, stop - start)
        into.copy_(taken)
    return own


def _with_places(intervals: Sequence[Interval]) -> list[tuple[int, int, int]]:
    """Return each interval after the place at which it begins among what is held of the axis."""
    places = accumulate((stop - start for start, stop in intervals), initial=0)
    return [(place, *interval) for place, interval in zip(places, intervals, strict=False)]


def _without_padding(own: Tensor, piece: Piece) -> Tensor:
    """Return the elements of what a rank holds that the whole tensor has; set those after them to zero."""
    filled = index_shape(piece.index)
    if filled == piece.shape:
        return own
    own[filled[0] :].zero_()
    return own[: filled[0]]
