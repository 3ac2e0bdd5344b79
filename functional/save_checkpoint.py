"""What a model has become, written to a folder that transformers and others read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar
from typing import ParamSpec as Arguments

import torch
from attrs import Factory, define, frozen
from torch import Tensor, nn

from ..specs.errors import PlanError, Problem
from .agreement import agree
from .checkpoints.declared_names import is_pretrained
from .checkpoints.hugging_face import INDEX
from .checkpoints.manifest_check import FORMAT, NAME
from .checkpoints.safetensors_writer import Layout, layout
from .checkpoints.saved_states import OPTIMIZER
from .checkpoints.tensor_bytes import bytes_of, sum_of
from .checkpoints.whole_folder import abandon, absolute, begin, finish
from .checkpoints.written_files import index_of, written_files
from .gather import agreed, collect, narrowed
from .held_tensors import modules_of
from .holders import held_first
from .stage_module import StageModule
from .training_state import LocalStates, State, all_states, local_states

if TYPE_CHECKING:
    from ..specs.mesh import Coordinate
    from ..specs.plan import Plan
    from ..specs.stored import Part
    from .checkpoints.declared_names import Kept
    from .checkpoints.written_files import Written

R = TypeVar("R")
P = Arguments("P")

_CONFIGS = ("config.json", "generation_config.json")


def save_checkpoint(
    plan: Plan,
    model: Any,
    folder: str | Path,
    *,
    optimizer: Any = None,
    format: Literal["huggingface", "dcp"] = "huggingface",  # noqa: A002  the word that everybody looks for
) -> None:
    """Write what a model has become, with original names and whole shapes; every rank of the mesh calls it.

    As a Hugging Face folder: rank 0 writes, one tensor after another, and holds one of them at a time, besides a message of
    32 MiB. The folder appears whole or not at all, with a ``manifest.json`` of the sums of all tensors; one that was saved
    there before is there until then. Files and names are those that the plan read; else those of ``save_pretrained``.

    Args:
        plan: What was executed.
        model: What ``execute`` returned.
        folder: Where it will be.
        optimizer: Its states are written too, whole, and its settings; ``load_optimizer`` reads them.
        format: ``huggingface``, or ``dcp`` for ``torch.distributed.checkpoint``: every rank writes its own parts.

    Raises:
        ValueError: If the format is another one.
        PlanError: In a single process, if the model is not the planned one, or the folder holds something else.
        ExecutionError: On every rank, with the first error of any rank.
    """
    if format == "dcp":
        from .checkpoints.dcp_writer import write_dcp

        write_dcp(plan, model, folder, optimizer=optimizer)
        return
    if format != "huggingface":
        msg = f"format is 'huggingface' or 'dcp', not {format!r}"
        raise ValueError(msg)
    held, here = agreed(plan, model)
    whole = _whole_model(plan, model)
    saving = _Saving(absolute(Path(folder)), is_writer=here.rank == 0)
    written = saving.attempt(written_files, plan, whole) or ()
    files = saving.attempt(_files_of_weights, plan, written, held, here) or []
    groups: tuple[Mapping[str, Any], ...] | None = None
    if optimizer is not None:
        states = saving.attempt(local_states, plan, held, optimizer) or LocalStates({}, ())
        found = all_states(plan, states)
        files += saving.attempt(_files_of_states, states, found, here) or []
        groups = states.groups
    saving.begin()
    saving.agree(plan, held)
    for file in files:
        saving.write(file)
    saving.finish(plan, index_of(written, plan.tree), groups, whole)
    saving.agree(plan, held)


@frozen
class _File:
    """A file that is written.

    Args:
        name: Its name.
        types: Dtype and shape of its tensors by key.
        where: Where they lie in it.
        bring: Fills a tensor on rank 0, where one is given; every rank calls it for every key, in their order.
    """

    name: str
    types: Mapping[str, tuple[str, tuple[int, ...]]]
    where: Layout
    bring: Callable[[str, Tensor | None], None]


@define
class _Saving:
    """A folder that is written, and the first thing that went wrong; after that nothing is written, but all take part.

    Args:
        folder: Where it will be.
        is_writer: Whether this is rank 0.
        error: What went wrong.
        has_begun: Whether there is something to remove then.
        sizes: Bytes of each file.
        sums: Sums of the tensors in each file, by key.
    """

    folder: Path
    is_writer: bool
    error: BaseException | None = None
    has_begun: bool = False
    sizes: dict[str, int] = Factory(dict)
    sums: dict[str, dict[str, str]] = Factory(dict)

    def attempt(self, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Do something, unless something went wrong before."""
        if self.error is not None:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever fails here, others wait for the messages to come
            self.error = error
            return None

    def agree(self, plan: Plan, held: Mapping[str, Tensor]) -> None:
        """Raise the first error of any rank on all; then nothing is left of what was written."""
        device = next((tensor.device for tensor in held.values()), torch.device("cpu"))
        try:
            agree(plan, self.error, device)
        except BaseException:
            if self.has_begun:
                abandon(self.folder)
            raise

    def begin(self) -> None:
        if self.is_writer:
            self.has_begun = self.attempt(begin, self.folder) is not None

    def write(self, file: _File) -> None:
        """Write a file, one tensor after another; each is let go before there is room for the next."""
        stream = self.attempt(self._opened, file) if self.is_writer else None
        for key in file.where.starts:
            dtype, shape = file.types[key]
            whole = None if stream is None else self.attempt(torch.empty, shape, dtype=getattr(torch, dtype))
            file.bring(key, whole)
            if stream is not None and whole is not None:
                self.attempt(self._put, stream, file.name, key, whole)
            del whole
        if stream is not None:
            self.attempt(stream.flush)
            with suppress(OSError):  # flush has told
                stream.close()

    def finish(
        self, plan: Plan, index: object, groups: tuple[Mapping[str, Any], ...] | None, model: nn.Module | None
    ) -> None:
        if self.is_writer:
            self.attempt(self._describe, plan, index, groups, model)
            self.attempt(finish, self.folder)

    def _opened(self, file: _File) -> IO[bytes]:
        self.sums[file.name], self.sizes[file.name] = {}, file.where.num_bytes
        stream = (_partial(self.folder) / file.name).open("wb")
        stream.write(file.where.header)
        return stream

    def _put(self, stream: IO[bytes], name: str, key: str, tensor: Tensor) -> None:
        stream.write(bytes_of(tensor))
        self.sums[name][key] = f"{sum_of(tensor):016x}"

    def _describe(
        self, plan: Plan, index: object, groups: tuple[Mapping[str, Any], ...] | None, model: nn.Module | None
    ) -> None:
        """Write what is said of the tensors, the manifest last."""
        partial = _partial(self.folder)
        if model is not None and is_pretrained(model):
            _write_config(model, partial)
        elif plan.folder is not None:
            for name in _CONFIGS:
                if (file := Path(plan.folder.path) / name).exists():
                    shutil.copyfile(file, partial / name)
        if index is not None:
            (partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        manifest = {"format": FORMAT, "files": self.sizes, "tensors": self.sums}
        if groups is not None:
            manifest["training"] = {"groups": list(groups)}
        (partial / NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _files_of_weights(plan: Plan, written: Iterable[Written], held: Mapping[str, Tensor], here: Coordinate) -> list[_File]:
    files: list[_File] = []
    for file in written:
        by_key = {kept.key: kept for kept in file.tensors}
        types = {kept.key: (kept.dtype, kept.shape) for kept in file.tensors}

        def bring(key: str, whole: Tensor | None, by_key: Mapping[str, Kept] = by_key) -> None:
            for part in by_key[key].parts:
                path = part.stored.key
                into = None if whole is None else _place(whole, part)
                collect(plan.tree[path], part.box, held.get(path), here, into)

        files.append(_File(file.name, types, layout(types, {"format": "pt"}), bring))
    return files


def _place(whole: Tensor, part: Part) -> Tensor:
    """Return the place in a stored tensor that a part fills, its axes in the order of the model's tensor."""
    place = narrowed(whole, tuple((at, at + size) for at, size in zip(part.at, part.shape, strict=True)))
    place = place[tuple(slice(None) if axis >= 0 else 0 for axis in part.axes)]
    named = [axis for axis in part.axes if axis >= 0]
    place = place.permute(sorted(range(len(named)), key=named.__getitem__))
    for axis in range(len(part.box)):
        place = place if axis in named else place.unsqueeze(axis)
    return place


def _files_of_states(local: LocalStates, states: Iterable[State], here: Coordinate) -> list[_File]:
    by_key = {state.key: state.spec for state in states}
    problems = [
        Problem(key, "the optimizer has noted it on other ranks, and not on this one", "Save it when all ranks have trained")
        for key, spec in by_key.items()
        if key not in local.tensors and held_first(spec, here) is not None
    ]
    if problems:
        raise PlanError(problems)

    def bring(key: str, whole: Tensor | None) -> None:
        spec = by_key[key]
        collect(spec, tuple((0, size) for size in spec.orig_shape), local.tensors.get(key), here, whole)

    types = {key: (spec.dtype, spec.orig_shape) for key, spec in by_key.items()}
    return [_File(OPTIMIZER, types, layout(types, {"format": "pt"}), bring)]


def _whole_model(plan: Plan, model: Any) -> nn.Module | None:
    """Return the model as it was before it was cut, or None."""
    if plan.runtime.model is not None:
        return plan.runtime.model
    (module, *others) = modules_of(model, plan.tree.values())
    return None if others or isinstance(module, StageModule) else module


def _write_config(model: Any, folder: Path) -> None:
    """Write the configuration of a transformers model, with what its own ``save_pretrained`` notes in it."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")
