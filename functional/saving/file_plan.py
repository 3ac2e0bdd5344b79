"""Plan the files of a saved model: the files and keys it was read from, else the files and keys of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

from attrs import frozen

from ...specs.dtypes import num_bytes
from ...specs.errors import PlanError, Problem
from ...specs.source import Loaded
from ...specs.stored import Part, StoredTensor
from ..checkpoints.formats.hugging_face import SINGLE
from ..checkpoints.key_mapping import TensorToSave, is_pretrained, saved_tensors, stored_form

if TYPE_CHECKING:
    from torch import nn

    from ...specs.plan import Plan
    from ...specs.tree import SpecTree

MAX_FILE_BYTES = 50 * 10**9
"""Largest file, as in transformers 5."""


@frozen
class PlannedFile:
    """A file to be written.

    Args:
        name: The file's name.
        tensors: Its tensors, in the order of the model.
    """

    name: str
    tensors: tuple[TensorToSave, ...]


def plan_files(plan: Plan, model: nn.Module | None) -> tuple[PlannedFile, ...]:
    """Return the files to write: the files and keys that the tensors were read from, else as ``save_pretrained`` does.

    Args:
        plan: The executed plan.
        model: The whole model, on meta or not; None if there is none.

    Raises:
        PlanError: If the keys are not known.
    """
    if read := as_read(plan.tree):
        return read
    if model is None:
        cause = "the plan carries no model that says under which names it is saved: it was loaded, and the model is cut"
        fix = 'Save with the plan that plan_build returned; or save_checkpoint(..., format="dcp")'
        raise PlanError([Problem("", cause, fix)])
    storages = _storages(model, plan.tree) if is_pretrained(model) else {}
    return tuple(_split_into_files(stored_form(model, plan.tree), storages))


def as_read(tree: SpecTree) -> tuple[PlannedFile, ...]:
    """Return the files that all tensors of a tree were read from, if each file was read whole; else no files."""
    files: dict[str, dict[str, tuple[StoredTensor, list[Part], str]]] = {}
    for spec in tree.values():
        if spec.kind == "non_persistent_buffer":
            continue
        if not isinstance(spec.source, Loaded):
            return ()
        whole = StoredTensor("", spec.path, 0, spec.orig_shape, spec.dtype)
        for part in spec.source.parts:
            _, parts, _ = files.setdefault(part.stored.file, {}).setdefault(part.stored.key, (part.stored, [], spec.dtype))
            parts.append(_inverse(part, whole))
    found: list[PlannedFile] = []
    for name, tensors in sorted(files.items()):
        to_save: list[TensorToSave] = []
        for key, (stored, parts, dtype) in tensors.items():
            if not name.endswith(".safetensors") or sum(prod(part.shape) for part in parts) != prod(stored.shape):
                return ()  # another format, or the file has tensors that the model lacks
            to_save.append(TensorToSave(key, stored.shape, dtype, tuple(parts)))
        found.append(PlannedFile(name, tuple(to_save)))
    return tuple(found)


def _inverse(part: Part, whole: StoredTensor) -> Part:
    """Invert a part: the box of the model's tensor that fills the box of the stored tensor."""
    sizes = part.shape
    box = tuple((at, at + size) for at, size in zip(part.at, sizes, strict=True))
    axes = tuple(part.axes.index(axis) if axis in part.axes else -1 for axis in range(len(part.box)))
    return Part(whole, box, tuple(start for start, _ in part.box), axes)


def _storages(model: nn.Module, tree: SpecTree) -> dict[str, tuple[int, int]]:
    """Return the identity and size of each tensor's storage when transformers saves it: experts may share a storage.

    transformers' own conversion is run on meta tensors to find out.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from ..model.read import storage_id

    whole = {
        name: torch.empty(spec.orig_shape, dtype=getattr(torch, spec.dtype), device="meta")
        for name, spec in saved_tensors(model, tree)
    }
    turned: dict[str, torch.Tensor] = revert_weight_conversion(model, whole)  # type: ignore[arg-type]  it is a transformer
    return {key: (storage_id(tensor), tensor.untyped_storage().nbytes()) for key, tensor in turned.items()}


def _split_into_files(tensors: Iterable[TensorToSave], storages: Mapping[str, tuple[int, int]]) -> Iterator[PlannedFile]:
    """Split tensors into files as ``split_torch_state_dict_into_shards`` of huggingface_hub does.

    Tensors that share a storage go to one file, which counts the whole storage; a storage over the limit gets its own file.
    """
    files: list[list[TensorToSave]] = []
    open_file: list[TensorToSave] = []
    filled = 0
    file_of: dict[int, list[TensorToSave]] = {}
    for number, tensor in enumerate(tensors):
        storage, size = storages.get(tensor.key, (-number, _stored_bytes(tensor)))
        if storage in file_of:
            file_of[storage].append(tensor)
            continue
        if size > MAX_FILE_BYTES:
            file_of[storage] = [tensor]
            files.append(file_of[storage])
            continue
        if filled + size > MAX_FILE_BYTES:
            files.append(open_file)
            open_file, filled = [], 0
        open_file.append(tensor)
        file_of[storage] = open_file
        filled += size
    files += [open_file] if open_file else []
    if len(files) <= 1:
        yield PlannedFile(SINGLE, tuple(files[0]) if files else ())
        return
    for number, in_file in enumerate(files, 1):
        yield PlannedFile(f"model-{number:05d}-of-{len(files):05d}.safetensors", tuple(in_file))


def _stored_bytes(tensor: TensorToSave) -> int:
    """Return the bytes of a tensor in its file."""
    return prod(tensor.shape) * num_bytes(tensor.dtype)


def index_of(files: Iterable[PlannedFile], tree: SpecTree) -> dict[str, object] | None:
    """Return the content of the index, as transformers writes it; None for a single file."""
    files = list(files)
    if [file.name for file in files] == [SINGLE]:
        return None
    num_parameters = sum(spec.num_elements for spec in tree.values() if spec.kind == "parameter")
    size = sum(_stored_bytes(tensor) for file in files for tensor in file.tensors)
    weight_map = {tensor.key: file.name for file in files for tensor in file.tensors}
    return {"metadata": {"total_parameters": num_parameters, "total_size": size}, "weight_map": weight_map}
