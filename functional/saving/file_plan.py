"""Which files a model is written to, under which names: those that it was read from, else those of transformers."""

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
from ..checkpoints.key_mapping import Kept, is_pretrained, saved_tensors, stored_form

if TYPE_CHECKING:
    from torch import nn

    from ...specs.plan import Plan
    from ...specs.tree import SpecTree

MAX_FILE_BYTES = 50 * 10**9
"""Where the next file begins, as in transformers 5."""


@frozen
class Written:
    """A file of tensors.

    Args:
        name: Its name.
        tensors: What lies in it, in the order in which the model has them.
    """

    name: str
    tensors: tuple[Kept, ...]


def written_files(plan: Plan, model: nn.Module | None) -> tuple[Written, ...]:
    """Return the files of a plan's tensors: the files and names that they were read from, else those of ``save_pretrained``.

    Args:
        plan: What was executed.
        model: The whole model, on meta or not; None if there is none.

    Raises:
        PlanError: If the names cannot be told.
    """
    if read := as_read(plan.tree):
        return read
    if model is None:
        cause = "the plan carries no model that says under which names it is saved: it was loaded, and the model is cut"
        fix = 'Save with the plan that plan_build returned; or save_checkpoint(..., format="dcp")'
        raise PlanError([Problem("", cause, fix)])
    kept = stored_form(model, plan.tree)
    return tuple(_in_files(kept, _storages(model, plan.tree) if is_pretrained(model) else {}))


def as_read(tree: SpecTree) -> tuple[Written, ...]:
    """Return the files that all tensors of a tree were read from, with all that was in them; none if it is otherwise."""
    files: dict[str, dict[str, tuple[StoredTensor, list[Part], str]]] = {}
    for spec in tree.values():
        if spec.kind == "non_persistent_buffer":
            continue
        if not isinstance(spec.source, Loaded):
            return ()
        whole = StoredTensor("", spec.path, 0, spec.orig_shape, spec.dtype)
        for part in spec.source.parts:
            _, parts, _ = files.setdefault(part.stored.file, {}).setdefault(part.stored.key, (part.stored, [], spec.dtype))
            parts.append(_reversed(part, whole))
    found: list[Written] = []
    for name, tensors in sorted(files.items()):
        kept: list[Kept] = []
        for key, (stored, parts, dtype) in tensors.items():
            if not name.endswith(".safetensors") or sum(prod(part.shape) for part in parts) != prod(stored.shape):
                return ()  # another format, or something in it that the model has not
            kept.append(Kept(key, stored.shape, dtype, tuple(parts)))
        found.append(Written(name, tuple(kept)))
    return tuple(found)


def _reversed(part: Part, whole: StoredTensor) -> Part:
    """Return what of a model's tensor makes a box of a stored one."""
    sizes = part.shape
    box = tuple((at, at + size) for at, size in zip(part.at, sizes, strict=True))
    axes = tuple(part.axes.index(axis) if axis in part.axes else -1 for axis in range(len(part.box)))
    return Part(whole, box, tuple(start for start, _ in part.box), axes)


def _storages(model: nn.Module, tree: SpecTree) -> dict[str, tuple[int, int]]:
    """Return the storage of each stored tensor when transformers saves it, and its bytes: experts are views of one.

    Its own code tells it, which is given tensors on meta.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    whole = {
        name: torch.empty(spec.orig_shape, dtype=getattr(torch, spec.dtype), device="meta")
        for name, spec in saved_tensors(model, tree)
    }
    turned: dict[str, torch.Tensor] = revert_weight_conversion(model, whole)  # type: ignore[arg-type]  it is a transformer
    storages = {key: tensor.untyped_storage() for key, tensor in turned.items()}
    return {key: (storage._cdata, storage.nbytes()) for key, storage in storages.items()}  # noqa: SLF001  its identity


def _in_files(kept: Iterable[Kept], storages: Mapping[str, tuple[int, int]]) -> Iterator[Written]:
    """Iterate over files as ``split_torch_state_dict_into_shards`` of huggingface_hub has them.

    What shares a storage goes to one file, which is filled by all of that storage; what is too large has a file of its own.
    """
    files: list[list[Kept]] = []
    open_file: list[Kept] = []
    filled = 0
    file_of: dict[int, list[Kept]] = {}
    for number, tensor in enumerate(kept):
        storage, size = storages.get(tensor.key, (-number, stored_bytes(tensor)))
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
        yield Written(SINGLE, tuple(files[0]) if files else ())
        return
    for number, tensors in enumerate(files, 1):
        yield Written(f"model-{number:05d}-of-{len(files):05d}.safetensors", tuple(tensors))


def stored_bytes(tensor: Kept) -> int:
    """Return the bytes of a tensor in its file."""
    return prod(tensor.shape) * num_bytes(tensor.dtype)


def index_of(files: Iterable[Written], tree: SpecTree) -> dict[str, object] | None:
    """Return what stands in the index of several files, as transformers writes it; None for one file alone."""
    files = list(files)
    if [file.name for file in files] == [SINGLE]:
        return None
    num_parameters = sum(spec.num_elements for spec in tree.values() if spec.kind == "parameter")
    size = sum(stored_bytes(tensor) for file in files for tensor in file.tensors)
    weight_map = {tensor.key: file.name for file in files for tensor in file.tensors}
    return {"metadata": {"total_parameters": num_parameters, "total_size": size}, "weight_map": weight_map}
