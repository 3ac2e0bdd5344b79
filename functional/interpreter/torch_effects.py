"""Effects for real: tensors on a device, messages between processes."""

from __future__ import annotations

from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import Factory, define
from torch import Tensor, nn

from ...specs.index import index_shape
from ...specs.intervals import placed
from ...specs.paths import name_of
from ...specs.program import InitProgram
from ...specs.receipt import AGREEMENT_BYTES
from ...specs.source import ModuleValues, OwnValues
from ..dialects import find_dialect
from ..dialects.handover import Handover, Wrapped
from ..init.evaluate import Job, evaluate
from ..layout.apply import RankContext, apply_layout
from ..layout.collectives import SyncGroup
from ..layout.device_mesh import of_groups
from ..layout.hooks import group_name
from ..model.copy import get_tensor, like, put_tensor, tied
from ..pipeline.build_stages import make_stage
from . import torch_init
from .ledger import Ledger
from .torch_loading import Loading
from .world import agree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from ...specs.layout_steps import LayoutStep
    from ...specs.mesh import Coordinate, MeshAxis
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.stored import Folder
    from ..pipeline.partition import Partition
    from . import work


@define
class TorchEffects:
    """Fills a copy of the model with the real tensors of one rank.

    Args:
        coordinate: The rank's coordinate.
        device: The device of its tensors.
        original: The user's module; its values are read, never written.
        module: The copy, with its tensors on meta; it is filled.
        callables: The user's functions by name.
        optimizer: Function from parameters to an optimizer.
        loss_fn: Loss of a pipeline's last stage, for the dialect.
        partition: The graphs of the pipeline's stages; None without a pipeline.
        ledger: Its allocations and messages.
        loading: Its reader of files.
        groups: Its process group along each set of mesh axes.
        neighbour_groups: Its groups of neighbours that hold parts in common, by name.
        tie_groups: Its process groups that join stages, by the stages' places along ``pipe``.
        tied: Parameters whose gradients are summed over stages, with the stages' places.
        modules: The modules that it runs: its stages, or the whole module.
        device_mesh: The device mesh of its DTensors; None if it has none.
        made_optimizer: The result of ``optimizer``.
        wrapped: The result of the dialect.
    """

    coordinate: Coordinate
    device: torch.device
    original: nn.Module
    module: nn.Module
    callables: Mapping[str, Any]
    optimizer: Callable[..., Any] | None = None
    loss_fn: Callable[..., Any] | None = None
    partition: Partition | None = None
    ledger: Ledger = Factory(Ledger)
    loading: Loading = Factory(lambda self: Loading(self.coordinate, self.ledger), takes_self=True)
    groups: dict[tuple[MeshAxis, ...], dist.ProcessGroup] = Factory(dict)
    neighbour_groups: dict[str, SyncGroup] = Factory(dict)
    tie_groups: dict[tuple[int, ...], dist.ProcessGroup] = Factory(dict)
    tied: dict[str, tuple[int, ...]] = Factory(dict)
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

    def make_groups(self, task: work.MakeGroups) -> None:
        mesh = self.coordinate.mesh
        for mesh_axes in task.over:
            for group in self._join(mesh.groups(*mesh_axes)):
                self.groups[mesh_axes] = group
        for mesh_axis, num in task.sharing:
            for group in self._join(mesh.neighbours(mesh_axis, num)):
                index = self.coordinate.index(mesh_axis) % num
                self.neighbour_groups[group_name(mesh_axis, num)] = SyncGroup(group.group_name, num, index)

    def make_tie_groups(self, task: work.MakeTieGroups) -> None:
        for between, groups in zip(task.between, task.groups, strict=True):
            for group in self._join(groups):
                self.tie_groups[between] = group

    def generate(self, task: work.Generate, seed: int) -> Sequence[Tensor]:
        whole = (self._allocate(piece) for piece in task.pieces)
        scratch = (
            self.take(piece) if isinstance(piece.spec.source, (ModuleValues, OwnValues)) else self._allocate(piece)
            for piece in task.scratch
        )
        made = torch_init.generate(task, whole, scratch, self.module, self.callables, seed=seed, device=self.device)
        for piece in task.scratch:
            self.ledger.free(piece.num_bytes)
        return made

    def evaluate(self, pieces: Sequence[work.Piece], seed: int) -> Sequence[Tensor]:
        made = [self._allocate(piece) for piece in pieces]
        parts = map(_without_padding, made, pieces)
        evaluate(
            (Job(out, _program(p), p.path, p.spec.orig_shape, p.index) for out, p in zip(parts, pieces, strict=True)), seed
        )
        return made

    def take(self, piece: work.Piece) -> Tensor:
        return _copy_part(self._allocate(piece), get_tensor(self.original, piece.path).detach(), piece)

    def load_shard(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[Tensor]:
        made = [self._allocate(piece) for piece in pieces]
        self.loading.read_shards([*map(_without_padding, made, pieces)], pieces, folder)
        return made

    def load_own(self, pieces: Sequence[work.Piece], folder: Folder) -> Sequence[Tensor]:
        made = [self._allocate(piece) for piece in pieces]
        self.loading.read_own(made, pieces, folder)
        return made

    def check_loaded(self, plan: Plan, *, failed: bool) -> None:
        self.loading.check(plan, self.device, failed=failed)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return self._count(torch.empty(shape, dtype=getattr(torch, dtype), device=self.device))

    def slice(self, whole: Tensor, piece: work.Piece) -> Tensor:
        # a copy: a view would keep the storage of the whole alive
        return _copy_part(self._allocate(piece), whole, piece)

    def view(self, whole: Tensor, piece: work.Piece) -> Tensor:
        assert piece.is_contiguous, "only a contiguous part can be sent as a view"
        for axis, ((start, stop),) in enumerate(piece.index):
            whole = whole.narrow(axis, start, stop - start)
        return whole

    def pack(self, tensors: Sequence[tuple[Tensor, work.Piece | None]], num_elements: int, dtype: str) -> Tensor:
        buffer, written = self.allocate((num_elements,), dtype), 0
        for whole, piece in tensors:
            num = whole.numel() if piece is None else piece.num_elements
            into = buffer[written : written + num]
            if piece is None:
                into.copy_(whole.reshape(-1))
            else:
                _copy_part(into.view(piece.shape), whole, piece)
            written += num
        buffer[written:].zero_()
        return buffer

    def unpack(self, buffer: Tensor, pieces: Sequence[work.Piece]) -> list[Tensor]:
        sizes = [piece.num_elements for piece in pieces]
        parts = buffer[: sum(sizes)].split(sizes)
        return [self._count(part.clone().view(piece.shape)) for part, piece in zip(parts, pieces, strict=True)]

    def broadcast(self, buffer: Tensor, message: work.Message) -> None:
        group = self.tie_groups[message.between] if message.between else self.groups[message.mesh_axes]
        dist.broadcast(_bytes(buffer), src=message.group.start, group=group)
        self._note(buffer, message)

    def scatter(self, buffer: Tensor, parts: Sequence[Tensor], message: work.Message) -> None:
        sent = [_bytes(part) for part in parts] if message.is_root else None
        dist.scatter(_bytes(buffer), sent, src=message.group.start, group=self.groups[message.mesh_axes])
        self._note(buffer, message)

    def free(self, tensor: Tensor) -> None:
        self.ledger.free(tensor.nbytes)

    def place(self, spec: ParamSpec, tensor: Tensor) -> None:
        owner, name = self.module.get_submodule(spec.module), name_of(spec.path)
        before = getattr(owner, name)
        if isinstance(owner, torch.jit.ScriptModule):
            with torch.no_grad():
                before.copy_(tensor)
        else:
            setattr(owner, name, like(before, tensor))
        self.ledger.place(getattr(owner, name).untyped_storage().nbytes())

    def tie(self, task: work.Tie) -> None:
        first = get_tensor(self.module, task.spec.path)
        for path in task.aliases:
            put_tensor(self.module, path, tied(get_tensor(self.module, path), first))

    def change_layout(self, step: LayoutStep) -> None:
        apply_layout(self.module, step, self._local)

    def take_stages(self, plan: Plan, task: work.TakeStages) -> None:
        assert self.partition is not None, "the opening agreement checks it"
        numbers = range(task.place, len(plan.stages), plan.mesh.pipe)
        self.modules = tuple(
            make_stage(plan, self.partition, number, self.module, self._local, self.device) for number in numbers
        )

    def sum_tied(self, task: work.SumTied) -> None:
        self.tied[task.spec.path] = task.between

    def as_dtensors(self, task: work.AsDTensors) -> None:
        from ..layout.dtensor import to_dtensors  # importing torch's DTensor takes a second

        groups = [self.groups[mesh_axis,] for mesh_axis in task.mesh_axes]
        self.device_mesh = of_groups(self.coordinate.mesh, task.mesh_axes, groups, self.device.type)
        to_dtensors(self.module, task.specs, self.coordinate.mesh, self.device_mesh)

    def make_optimizer(self) -> None:
        found = [parameter for module in self.modules for parameter in module.parameters()]
        trained = [parameter for parameter in dict.fromkeys(found) if parameter.requires_grad]
        self.made_optimizer = self.optimizer(trained) if self.optimizer else None

    def wrap(self, plan: Plan) -> None:
        dialect, _ = find_dialect(plan.target)
        assert dialect is not None, "the opening agreement checks it"
        tied: list[tuple[Any, bool, Any]] = [
            (get_tensor(self.module, path), self.coordinate.pipe == between[0], self.tie_groups[between])
            for path, between in self.tied.items()
        ]
        self.wrapped = dialect.wrap(
            Handover(self.modules, plan, self.device, self.groups, tied, self.made_optimizer, self.loss_fn)
        )

    @cached_property
    def _local(self) -> RankContext:
        """This rank for changes of layout; the groups are made by then."""
        groups: dict[str, SyncGroup] = {
            mesh_axes[0]: SyncGroup(group.group_name, dist.get_world_size(group), self.coordinate.index(mesh_axes[0]))
            for mesh_axes, group in self.groups.items()
            if len(mesh_axes) == 1
        }
        return RankContext(self.coordinate, groups | self.neighbour_groups, self.callables)

    def _join(self, groups: Iterable[Iterable[int]]) -> Iterator[dist.ProcessGroup]:
        """Take part in making process groups; iterate over those that this rank is a member of."""
        for ranks in map(sorted, groups):
            group = dist.new_group(ranks)
            self.ledger.num_groups += 1
            if self.rank in ranks:
                assert isinstance(group, dist.ProcessGroup), "a member gets the group itself"
                yield group

    def _allocate(self, piece: work.Piece) -> Tensor:
        return self.allocate(piece.shape, piece.spec.dtype)

    def _count(self, tensor: Tensor) -> Tensor:
        self.ledger.allocate(tensor.nbytes)
        return tensor

    def _note(self, buffer: Tensor, message: work.Message) -> None:
        self.ledger.call(message.op, message.mesh_axes, message.group, buffer.nbytes)


def _bytes(buffer: Tensor) -> Tensor:
    """View a tensor as its bytes: gloo sends neither fp8 nor complex numbers, and non-contiguous tensors wrongly."""
    assert buffer.is_contiguous(), "messages are contiguous"
    return buffer.reshape(-1).view(torch.uint8)


def _program(piece: work.Piece) -> InitProgram:
    assert isinstance(piece.spec.source, InitProgram), "only init programs are evaluated"
    return piece.spec.source


def _copy_part(part: Tensor, whole: Tensor, piece: work.Piece) -> Tensor:
    """Copy the intervals of a piece out of a whole tensor into ``part``, and return ``part``."""
    assert whole.numel() == prod(piece.spec.orig_shape), "a part is cut from a whole tensor"
    filled = _without_padding(part, piece)
    for box in product(*(tuple(placed(intervals, intervals)) for intervals in piece.index)):
        taken, into = whole, filled
        for axis, ((start, stop), (place, _)) in enumerate(box):
            taken, into = taken.narrow(axis, start, stop - start), into.narrow(axis, place, stop - start)
        into.copy_(taken)
    return part


def _without_padding(part: Tensor, piece: work.Piece) -> Tensor:
    """Return the entries of a part that the whole tensor has; set the padding after them to zero."""
    filled = index_shape(piece.index)
    if filled == piece.shape:
        return part
    part[filled[0] :].zero_()
    return part[: filled[0]]
