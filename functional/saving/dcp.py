"""Write a model and its optimizer's states as torch's distributed checkpoint; every rank writes its own boxes."""

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
from ..dialects import dialect_of
from .atomic import abandon_folder, absolute, begin_folder, finish_folder, partial_of
from .gather import agreed
from .messages import agreement, view_box
from .optimizer_states import LocalStates, local_states

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan

_ALONE = "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to save in a single process."


def write_dcp(plan: Plan, model: Any, folder: str | Path, *, optimizer: Any = None) -> None:
    """Write a folder that ``torch.distributed.checkpoint`` reads on any mesh; every rank of the mesh calls this.

    ::

        state = {path: torch.empty(...), "optimizer": {"state": {path: {"exp_avg": torch.empty(...)}}}}
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)

    Each element is written once, by the first rank that holds it; padding is not written. A rank copies one box at a time;
    of DeepSpeed's states, which lie in flat pieces, it copies all of its own. Keys are those of the model's state dict, each
    of the names of tied tensors included. The folder appears whole or not at all.

    Args:
        plan: The executed plan.
        model: The model that ``execute`` returned.
        folder: The new folder; nothing is there yet.
        optimizer: Its states are written too, under ``optimizer.state.<path>.<name>``.

    Raises:
        PlanError: In a single process, if the model differs from the plan, or something is in the folder.
        ExecutionError: On every rank, with the first error of any rank.
    """
    held, here = agreed(plan, model)
    folder = absolute(Path(folder))
    boxes: list[_BoxToWrite] = []
    with agreement(plan):
        _check(plan, held, folder)
        states = LocalStates({}, ()) if optimizer is None else local_states(plan, held, optimizer)
        boxes = [*_boxes_of_weights(plan, held, here), *_boxes_of_states(plan, states, here)]
        if here.rank == 0:
            begin_folder(folder)
    with agreement(plan):
        try:
            _save(boxes, partial_of(folder))
            if here.rank == 0:
                finish_folder(folder)
        except Exception:
            if here.rank == 0:
                abandon_folder(folder)
            raise


@frozen(eq=False)
class _BoxToWrite:
    """A box of a tensor that this rank writes.

    Args:
        path: Path of the tensor in the state dict.
        shape: Shape of the whole tensor.
        at: First entry of the box along each axis.
        values: The box's values.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    at: tuple[int, ...]
    values: Tensor

    @property
    def index(self) -> MetadataIndex:
        """The box's key in ``.metadata``."""
        return MetadataIndex(".".join(self.path), self.at)

    @property
    def item(self) -> WriteItem:
        """The box as torch's instruction to write it."""
        chunk = ChunkStorageMetadata(torch.Size(self.at), self.values.size())
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.values), torch.Size(self.shape))
        return WriteItem(self.index, WriteItemType.SHARD, tensor_data=data)


class _Planner(DefaultSavePlanner):
    """A save planner that writes given boxes instead of a state dict."""

    def __init__(self, boxes: list[_BoxToWrite]) -> None:
        super().__init__()
        self._boxes = {box.index: box for box in boxes}

    def create_local_plan(self) -> SavePlan:
        """Return the boxes that this rank writes, and their paths in the state dict."""
        boxes = self._boxes.values()
        paths: Any = {".".join(box.path): box.path for box in boxes}
        self.plan = SavePlan([box.item for box in boxes], planner_data=paths)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return a box on the CPU, contiguous."""
        return self._boxes[write_item.index].values.detach().cpu().contiguous()


def _save(boxes: list[_BoxToWrite], partial: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ALONE)
        writer = FileSystemWriter(partial)
        save({}, storage_writer=writer, planner=_Planner(boxes), no_dist=not dist.is_initialized())


def _boxes_of_weights(plan: Plan, held: Mapping[str, Tensor], here: Coordinate) -> Iterator[_BoxToWrite]:
    for spec in plan.tree.values():
        if spec.kind != "non_persistent_buffer":
            for path in spec.paths:
                yield from _boxes(spec, (path,), held.get(spec.path), here)


def _boxes_of_states(plan: Plan, local: LocalStates, here: Coordinate) -> Iterator[_BoxToWrite]:
    for key, tensor in local.tensors.items():
        state, _, path = key.partition("/")
        spec = plan.tree[path]
        like = spec if tensor.dim() or not spec.orig_shape else evolve(spec, orig_shape=(), shards=())
        yield from _boxes(like, ("optimizer", "state", path, state), tensor, here)


def _boxes(spec: ParamSpec, path: tuple[str, ...], local: Tensor | None, here: Coordinate) -> Iterator[_BoxToWrite]:
    """Iterate over the boxes of a tensor for which this rank is the first holder."""
    if local is None:
        return
    if not spec.num_elements:
        if here.is_first(*STAGE_AXES) and here.pipe == spec.places(here.mesh)[0]:
            yield _BoxToWrite(path, spec.orig_shape, (0,) * len(spec.orig_shape), local.new_empty(spec.orig_shape))
        return
    index = held_first(spec, here)
    for there, own in local_boxes(spec, here, index) if index is not None else ():
        yield _BoxToWrite(path, spec.orig_shape, tuple(start for start, _ in there), view_box(local.detach(), own))


def _check(plan: Plan, held: Mapping[str, Tensor], folder: Path) -> None:
    """Raise PlanError if the folder exists with something in it, or the runtime keeps a tensor in pieces."""
    problems: list[Problem] = []
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(Problem(str(folder), "it is there already", "Save under another name"))
    holding = dialect_of(plan.target).holding()
    for path, tensor in held.items():
        if in_pieces := holding.in_pieces(tensor):
            cause = f"{in_pieces}, which no rank can write without the others"
            problems.append(Problem(path, cause, "save_checkpoint(plan, model, folder)", plan.tree[path].type))
    if problems:
        raise PlanError(problems)
