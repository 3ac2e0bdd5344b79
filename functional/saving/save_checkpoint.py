"""Save a trained model to a folder that transformers reads."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...specs.errors import PlanError, Problem
from ...specs.ownership import held_first
from ..checkpoints.formats.hugging_face import INDEX
from ..checkpoints.key_mapping import is_pretrained
from ..checkpoints.optimizer_states import STATES_FILE, ParamGroup
from ..dialects import dialect_of
from ..pipeline.stage_module import StageModule
from .atomic import absolute
from .collective_save import CollectiveSave, FileToWrite
from .file_plan import index_of, plan_files
from .gather import agreed, collect
from .held_tensors import modules_of
from .messages import view_box
from .optimizer_states import LocalStates, TensorState, all_groups, all_states, local_states
from .safetensors import file_layout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...specs.mesh import Coordinate
    from ...specs.plan import Plan
    from ...specs.stored import Part
    from ..checkpoints.key_mapping import TensorToSave
    from .file_plan import PlannedFile

_CONFIGS = ("config.json", "generation_config.json")


def save_checkpoint(
    plan: Plan,
    model: Any,
    folder: str | Path,
    *,
    optimizer: Any = None,
    format: Literal["huggingface", "dcp"] = "huggingface",  # noqa: A002  the usual word
) -> None:
    """Save a model under original names and in whole shapes; every rank of the mesh calls it.

    As a Hugging Face folder: rank 0 writes one tensor after another, and holds one tensor at a time, besides a message of
    32 MiB. The folder appears whole or not at all, with a ``manifest.json`` of the checksums of all tensors; a folder saved
    there before stays until then. Files and names are those that the plan read, else those of ``save_pretrained``.

    Args:
        plan: The executed plan.
        model: The model that ``execute`` returned.
        folder: The folder that will appear.
        optimizer: Its states are written too, whole, and its settings; ``load_optimizer`` reads them.
        format: ``huggingface``, or ``dcp`` for ``torch.distributed.checkpoint``: every rank writes its own parts.

    Raises:
        ValueError: If the format is unknown.
        PlanError: In a single process, if the model differs from the plan, or the folder holds something else.
        ExecutionError: On every rank, with the first error of any rank.
    """
    if format == "dcp":
        from .dcp import write_dcp

        write_dcp(plan, model, folder, optimizer=optimizer)
        return
    if format != "huggingface":
        msg = f"format is 'huggingface' or 'dcp', not {format!r}"
        raise ValueError(msg)
    held, here = agreed(plan, model)
    whole = _whole_model(plan, model)
    saving = CollectiveSave(absolute(Path(folder)), is_writer=here.rank == 0)
    planned = saving.attempt(plan_files, plan, whole) or ()
    files = saving.attempt(_files_of_weights, plan, planned, held, here) or []
    groups: tuple[ParamGroup, ...] | None = None
    if optimizer is not None:
        states = saving.attempt(local_states, plan, held, optimizer) or LocalStates({}, ())
        found = all_states(plan, states)
        files += saving.attempt(_files_of_states, states, found, here) or []
        groups = all_groups(states)
    saving.attempt(_check_names, files)
    saving.begin()
    saving.agree(plan)
    for file in files:
        saving.write(file)
    saving.agree(plan)  # before the folder appears: a rank may have sent zeros in place of a message
    training = (
        None if groups is None else {"groups": [{"settings": group.settings, "paths": group.paths} for group in groups]}
    )
    saving.finish(partial(_describe, plan, index_of(planned, plan.tree), whole), training)
    saving.agree(plan)


def _check_names(files: Iterable[FileToWrite]) -> None:
    names = [file.name for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        cause = "weights were read from a file of this name, and the optimizer's states go to it"
        raise PlanError(
            [Problem(twice, cause, "Rename it in the folder that was read and in its index; or save without optimizer=")]
        )


def _files_of_weights(
    plan: Plan, planned: Iterable[PlannedFile], held: Mapping[str, Tensor], here: Coordinate
) -> list[FileToWrite]:
    files: list[FileToWrite] = []
    holding = dialect_of(plan.target).holding()
    for file in planned:
        by_key = {tensor.key: tensor for tensor in file.tensors}
        types = {tensor.key: (tensor.dtype, tensor.shape) for tensor in file.tensors}

        def collect_key(key: str, whole: Tensor | None, by_key: Mapping[str, TensorToSave] = by_key) -> None:
            for part in by_key[key].parts:
                path = part.stored.key
                into = None if whole is None else _destination(whole, part)
                with holding.gathered(held.get(path)):
                    collect(plan.tree[path], part.box, held.get(path), here, into)

        files.append(FileToWrite(file.name, types, file_layout(types, {"format": "pt"}), collect_key))
    return files


def _destination(whole: Tensor, part: Part) -> Tensor:
    """Return the view of a stored tensor that a part fills, with the axes of the model's tensor."""
    place = view_box(whole, tuple((at, at + size) for at, size in zip(part.at, part.shape, strict=True)))
    place = place[tuple(slice(None) if axis >= 0 else 0 for axis in part.axes)]
    named = [axis for axis in part.axes if axis >= 0]
    place = place.permute(sorted(range(len(named)), key=named.__getitem__))
    for axis in range(len(part.box)):
        place = place if axis in named else place.unsqueeze(axis)
    return place


def _files_of_states(local: LocalStates, states: Iterable[TensorState], here: Coordinate) -> list[FileToWrite]:
    by_key = {state.key: state.spec for state in states}
    problems = [
        Problem(key, "the optimizer has noted it on other ranks, and not on this one", "Save it when all ranks have trained")
        for key, spec in by_key.items()
        if key not in local.tensors and held_first(spec, here) is not None
    ]
    if problems:
        raise PlanError(problems)

    def collect_key(key: str, whole: Tensor | None) -> None:
        spec, state, error = by_key[key], None, None
        try:
            state = local.tensors.get(key)
        except Exception as failed:  # noqa: BLE001  rank 0 waits for this rank's messages
            error = failed
        try:
            collect(spec, tuple((0, size) for size in spec.orig_shape), state, here, whole)
        finally:
            if error is not None:
                raise error

    types = {key: (spec.dtype, spec.orig_shape) for key, spec in by_key.items()}
    return [FileToWrite(STATES_FILE, types, file_layout(types, {"format": "pt"}), collect_key)]


def _whole_model(plan: Plan, model: Any) -> nn.Module | None:
    """Return the model as it was before it was cut into stages; None if it is not at hand."""
    if plan.runtime.model is not None:
        return plan.runtime.model
    (module, *others) = modules_of(model, plan.tree.values())
    return None if others or isinstance(module, StageModule) else module


def _describe(plan: Plan, index: Mapping[str, object] | None, model: nn.Module | None, folder: Path) -> None:
    """Write the index of several files and the model's configuration."""
    if model is not None and is_pretrained(model):
        _write_config(model, folder)
    elif plan.folder is not None:
        for name in _CONFIGS:
            if (file := Path(plan.folder.path) / name).exists():
                shutil.copyfile(file, folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_config(model: Any, folder: Path) -> None:
    """Write the configuration of a transformers model, with the fields that ``save_pretrained`` adds."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
