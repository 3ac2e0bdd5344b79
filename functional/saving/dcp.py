"""A model and its optimizer's states, written as torch's distributed checkpoint: every rank its own, at the right places."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import evolve, frozen
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from ...specs.errors import PlanError, Problem
from ...specs.mesh import STAGE_AXES
from ...specs.ownership import held_first, local_boxes
from ..interpreter.world import agree
from .atomic_folder import abandon, absolute, begin, finish, partial_of
from .gather import agreed
from .messages import messages_on
from .optimizer_states import LocalStates, local_states

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.stored import Box

_ALONE = "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to save in a single process."


def write_dcp(plan: Plan, model: Any, folder: str | Path, *, optimizer: Any = None) -> None:
    """Write a folder that ``torch.distributed.checkpoint`` reads on any mesh; every rank of the mesh calls it.

    ::

        state = {path: torch.empty(...), "optimizer": {"state": {path: {"exp_avg": torch.empty(...)}}}}
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)

    Each element is written once, by the first rank that holds it, padding by none; a rank holds one box at a time besides
    what it has; of DeepSpeed's states, which lie in flat pieces, all of its own. Keys are those of the model's state dict,
    tied names too. The folder appears whole or not at all.

    Args:
        plan: What was executed.
        model: What ``execute`` returned.
        folder: Where it will be; nothing is there yet.
        optimizer: Its states are written too, under ``optimizer.state.<path>.<name>``.

    Raises:
        PlanError: In a single process, if the model is not the planned one, or something is in the folder.
        ExecutionError: On every rank, with the first error of any rank.
    """
    held, here = agreed(plan, model)
    folder = absolute(Path(folder))
    error: BaseException | None = None
    boxes: list[_Box] = []
    try:
        _check(plan, held, folder)
        states = LocalStates({}, ()) if optimizer is None else local_states(plan, held, optimizer)
        boxes = [*_of_weights(plan, held, here), *_of_states(plan, states, here)]
        if here.rank == 0:
            begin(folder)
    except Exception as wrong:  # noqa: BLE001  the other ranks wait for the agreement
        error = wrong
    agree(plan, error, messages_on())
    try:
        _save(boxes, partial_of(folder))
        if here.rank == 0:
            finish(folder)
    except Exception as wrong:  # noqa: BLE001  the other ranks wait for the agreement
        error = wrong
        if here.rank == 0:
            abandon(folder)
    agree(plan, error, messages_on())


@frozen(eq=False)
class _Box:
    """A box of a tensor that this rank writes.

    Args:
        path: Where it is in the state dict.
        shape: Shape of the whole tensor.
        at: Where the box begins in it.
        values: The box.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    at: tuple[int, ...]
    values: Tensor

    @property
    def index(self) -> MetadataIndex:
        """What torch calls it."""
        return MetadataIndex(".".join(self.path), self.at)

    @property
    def item(self) -> WriteItem:
        """What torch is to write."""
        chunk = ChunkStorageMetadata(torch.Size(self.at), self.values.size())
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.values), torch.Size(self.shape))
        return WriteItem(self.index, WriteItemType.SHARD, tensor_data=data)


class _Planner(DefaultSavePlanner):
    """Boxes as the plan of what this rank writes, instead of one made from a state dict."""

    def __init__(self, boxes: list[_Box]) -> None:
        super().__init__()
        self._boxes = {box.index: box for box in boxes}

    def create_local_plan(self) -> SavePlan:
        """Return what this rank writes, and where in a state dict it is."""
        boxes = self._boxes.values()
        paths: Any = {".".join(box.path): box.path for box in boxes}
        self.plan = SavePlan([box.item for box in boxes], planner_data=paths)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return a box, on the CPU, its elements one after another."""
        return self._boxes[write_item.index].values.detach().cpu().contiguous()


def _save(boxes: list[_Box], partial: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ALONE)
        writer = FileSystemWriter(partial)
        save({}, storage_writer=writer, planner=_Planner(boxes), no_dist=not dist.is_initialized())


def _of_weights(plan: Plan, held: Mapping[str, Tensor], here: Coordinate) -> Iterator[_Box]:
    for spec in plan.tree.values():
        if spec.kind != "non_persistent_buffer":
            for path in spec.paths:
                yield from _boxes(spec, (path,), held.get(spec.path), here)


def _of_states(plan: Plan, local: LocalStates, here: Coordinate) -> Iterator[_Box]:
    for key, tensor in local.tensors.items():
        state, _, path = key.partition("/")
        spec = plan.tree[path]
        like = spec if tensor.dim() or not spec.orig_shape else evolve(spec, orig_shape=(), shards=())
        yield from _boxes(like, ("optimizer", "state", path, state), tensor, here)


def _boxes(spec: ParamSpec, path: tuple[str, ...], local: Tensor | None, here: Coordinate) -> Iterator[_Box]:
    """Iterate over the boxes of a tensor that no rank before this one holds."""
    if local is None:
        return
    if not spec.num_elements:
        if here.is_first(*STAGE_AXES) and here.pipe == spec.places(here.mesh)[0]:
            yield _Box(path, spec.orig_shape, (0,) * len(spec.orig_shape), local.new_empty(spec.orig_shape))
        return
    index = held_first(spec, here)
    for there, own in local_boxes(spec, here, index) if index is not None else ():
        yield _Box(path, spec.orig_shape, tuple(start for start, _ in there), _narrowed(local.detach(), own))


def _narrowed(tensor: Tensor, box: Box) -> Tensor:
    for axis, (start, stop) in enumerate(box):
        tensor = tensor.narrow(axis, start, stop - start)
    return tensor


def _check(plan: Plan, held: Mapping[str, Tensor], folder: Path) -> None:
    """Raise PlanError if something is where the folder will be, or ZeRO 3 has a tensor in pieces."""
    problems: list[Problem] = []
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(Problem(str(folder), "it is there already", "Save under another name"))
    for path, tensor in held.items():
        if hasattr(tensor, "ds_id"):
            cause = "ZeRO 3 keeps it in pieces, which no rank can write without the others"
            problems.append(Problem(path, cause, "save_checkpoint(plan, model, folder)", plan.tree[path].type))
    if problems:
        raise PlanError(problems)
