"""A folder that ``torch.distributed.checkpoint.save`` wrote, read without unpickling.

``.metadata`` is a pickle: the size, dtype and chunks of each tensor, and for each chunk the byte range of a file to which
``torch.save`` wrote it. Tensors get their names in the model's state dict, however deep it was nested when it was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from attrs import frozen
from frozendict import frozendict

from ....specs.errors import PlanError, Problem
from ....specs.stored import Contents, Folder, Part, StoredFile
from ..assembly import miscovered
from .inert_pickle import Entries, Global, Record, read_pickle
from .torch_save import DTYPES, read_saved
from .untrusted import are_sizes, is_plain_name, open_regular

METADATA = ".metadata"

_META = "torch.distributed.checkpoint.metadata."
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_GLOBALS = DTYPES | {
    *(f"{_META}{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *(f"{_META}{name}" for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "_local.PosixPath")),
    _INFO,
    "collections.OrderedDict",
    "torch.Size",
    "torch.serialization._get_layout",
}
_MAX_BYTES = 2**29
_AGAIN = "Copy the folder again, or go back to the checkpoint before"
_MODELS = ("model", "module", "state_dict", "model_state_dict")
_OPTIMIZERS = ("optim", "optimizer", "optimizers", "optim_state_dict", "optimizer_state_dict", "state")


@frozen
class _Chunk:
    """A box of a tensor, and the byte range of a file that it was written to."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    place: tuple[int, int]


@frozen
class _Tensor:
    """The entry of a tensor in ``.metadata``."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[_Chunk, ...]


def read(folder: str) -> Contents:
    """List the model's tensors in a folder that torch's distributed checkpoint wrote.

    A state dict saved at the top has its tensors under their names. A nested state dict, as in
    ``save({"model": model.state_dict(), "optim": ...})`` or under a ``Stateful``, is found by ``planner_data``, which has
    the path of each tensor in the saved object: the only dict of tensors that is not an optimizer's, else the dict called
    ``model``, ``module``, ``state_dict`` or ``model_state_dict``, else the outermost. Only tensors are read.

    Raises:
        PlanError: If a file is missing, cut off or damaged, could run code, or contradicts ``.metadata``.
    """
    metadata, file = _metadata(folder)
    try:
        chosen = _model(metadata, folder)
        tensors = {name: _tensor(metadata, key) for name, key in chosen.items()}
    except PlanError:
        raise
    except (ValueError, TypeError) as error:
        raise PlanError([Problem(METADATA, str(error), _AGAIN)]) from None
    problems: list[Problem] = []
    parts = {name: _parts(folder, tensor, problems) for name, tensor in tensors.items()}
    names = sorted({chunk.file for tensor in tensors.values() for chunk in tensor.chunks})
    if problems:
        raise PlanError(problems)
    files = (file, *(StoredFile(name, (Path(folder) / name).stat().st_size) for name in names))
    return Contents(Folder(folder, files), frozendict(parts))


@frozen(eq=False)
class _Metadata:
    """The content of ``.metadata``.

    Args:
        tensors: Entry of each tensor by key.
        paths: Path of each tensor in the saved object.
        places: File, first byte and length of each chunk, by the tensor's key and the chunk's offsets.
    """

    tensors: Mapping[str, Record]
    paths: Mapping[str, tuple[str, ...]]
    places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]


def _metadata(folder: str) -> tuple[_Metadata, StoredFile]:
    """Read ``.metadata``."""
    with open_regular(folder, METADATA, _AGAIN) as opened:
        data = opened.read(_MAX_BYTES + 1)
    pickled = read_pickle(data, METADATA, _GLOBALS, _MAX_BYTES)
    try:
        found = _parsed(pickled)
    except (ValueError, TypeError) as error:
        raise PlanError([Problem(METADATA, f"it is not as torch writes it: {error}", _AGAIN)]) from None
    return found, StoredFile(METADATA, len(data), sha256(data).hexdigest())


def _parsed(pickled: Any) -> _Metadata:
    """Return the fields of a pickled ``Metadata`` that matter here."""
    state = _state(pickled, f"{_META}Metadata")
    tensors: dict[str, Record] = {}
    for key, value in _pairs(state.get("state_dict_metadata")):
        if _text(key) in tensors:
            msg = f"tensor {key!r} is there twice"
            raise ValueError(msg)
        if isinstance(value, Record) and value.name == f"{_META}TensorStorageMetadata":
            tensors[key] = value
    paths: dict[str, tuple[str, ...]] = {}
    planned = state.get("planner_data")
    for key, value in _pairs(planned) if isinstance(planned, Entries) else ():
        if isinstance(value, tuple) and value and all(type(step) in {str, int} for step in value):
            paths[_text(key)] = tuple(map(str, value))
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for key, value in _pairs(state.get("storage_data")):
        index, info = _state(key, f"{_META}MetadataIndex"), _state(value, _INFO)
        name = _text(index.get("fqn"))
        if name not in tensors:
            continue
        if info.get("transform_descriptors"):
            msg = f"{name!r} was written by way of an extension (compressed, say), which is not read"
            raise ValueError(msg)
        begin, length = _sizes((info.get("offset"), info.get("length")))
        places[name, _size(index.get("offset"))] = _text(info.get("relative_path")), begin, length
    return _Metadata(tensors, paths, places)


def _model(metadata: _Metadata, folder: str) -> dict[str, str]:
    """Return the key of each of the model's tensors, by its name in the state dict."""
    by_dict: dict[tuple[str, ...], dict[str, str]] = {}
    for key in metadata.tensors:
        *outer, name = metadata.paths.get(key, (key,))
        if not any(step in _OPTIMIZERS for step in outer):
            by_dict.setdefault(tuple(outer), {})[name] = key
    called = [outer for outer in by_dict if outer and outer[-1] in _MODELS]
    if len(by_dict) == 1 or not by_dict:
        return next(iter(by_dict.values()), {})
    if len(called) == 1:
        return by_dict[called[0]]
    if () in by_dict:
        return by_dict[()]
    names = " and ".join(sorted(repr(".".join(outer)) for outer in by_dict))
    cause = f"it has tensors under {names}, and nothing says which are the model's"
    raise PlanError([Problem(folder, cause, 'Save them as {"model": model.state_dict(), ...}')])


def _tensor(metadata: _Metadata, key: str) -> _Tensor:
    """Return the entry of a tensor, checked."""
    state = _state(metadata.tensors[key], f"{_META}TensorStorageMetadata")
    properties = state.get("properties")
    match properties:
        case Record(name=name, state=(Global(name=dtype), *_)) if name == f"{_META}TensorProperties":
            pass
        case Record(name=name, state=Entries() as fields) if name == f"{_META}TensorProperties":
            dtype = fields.get("dtype").name if isinstance(fields.get("dtype"), Global) else ""
        case _:
            dtype = ""
    if dtype not in DTYPES:
        msg = f"it gives {key!r} no dtype that plans know"
        raise ValueError(msg)
    chunks: list[_Chunk] = []
    written = state.get("chunks")
    for chunk in written if isinstance(written, list) else ():
        box = _state(chunk, f"{_META}ChunkStorageMetadata")
        offsets, sizes = _size(box.get("offsets")), _size(box.get("sizes"))
        if (key, offsets) not in metadata.places:
            msg = f"it does not say where the chunk of {key!r} at {list(offsets)} is"
            raise ValueError(msg)
        file, *place = metadata.places[key, offsets]
        if not is_plain_name(file):
            msg = f"it says that {key!r} is in {file[:80]!r}, which is not in the folder"
            raise ValueError(msg)
        chunks.append(_Chunk(offsets, sizes, file, (place[0], place[1])))
    return _Tensor(key, _size(state.get("size")), dtype.removeprefix("torch."), tuple(chunks))


def _parts(folder: str, tensor: _Tensor, problems: list[Problem]) -> tuple[Part, ...]:
    """Return the parts of a tensor; problems with them are appended to ``problems``."""
    parts: list[Part] = []
    for chunk in sorted(tensor.chunks, key=lambda chunk: (chunk.file, chunk.place)):
        try:
            saved = read_saved(folder, chunk.file, place=chunk.place)
            stored = saved.tensor(tensor.key, saved.value)
        except PlanError as error:
            about = f" (tensor {tensor.key!r}, at {list(chunk.offsets)})"
            problems += [
                Problem(p.path, p.cause if p.path == tensor.key else p.cause + about, p.fix) for p in error.problems
            ]
            continue
        if stored.shape != chunk.sizes or stored.dtype != tensor.dtype:
            cause = (
                f"{chunk.file} has {stored.dtype}{list(stored.shape)} of it at {list(chunk.offsets)}, and {METADATA} says "
            )
            problems.append(Problem(tensor.key, f"{cause}{tensor.dtype}{list(chunk.sizes)}", _AGAIN))
            continue
        axes = tuple(range(len(chunk.sizes)))
        parts.append(Part(stored, tuple((0, size) for size in chunk.sizes), chunk.offsets, axes))
    if len(parts) == len(tensor.chunks):
        problems += _uncovered(tensor, parts)
    return tuple(sorted(parts, key=lambda part: part.at))


def _uncovered(tensor: _Tensor, parts: list[Part]) -> Iterator[Problem]:
    """Iterate over problems if the parts do not cover the tensor, each element once."""
    for part in parts:
        ends = zip(part.at, part.shape, tensor.shape, strict=False)
        if len(part.at) != len(tensor.shape) or any(at + size > length for at, size, length in ends):
            cause = f"its chunk at {list(part.at)} of {list(part.shape)} is not within its shape {list(tensor.shape)}"
            yield Problem(tensor.key, f"in {METADATA} {cause}", _AGAIN)
            return
    if not parts:
        yield Problem(tensor.key, f"in {METADATA} it has no chunks", _AGAIN)
        return
    if fault := miscovered(tensor.shape, parts):
        place, count = fault
        cause = f"element {list(place)} of {list(tensor.shape)} is in {count} of its {len(parts)} chunks"
        yield Problem(tensor.key, f"in {METADATA} {cause}", _AGAIN)


def _state(record: Any, name: str) -> Entries:
    """Return the fields of a pickled dataclass instance."""
    if not (isinstance(record, Record) and record.name == name and isinstance(record.state, Entries)):
        msg = f"there is no {name.rpartition('.')[2]} where one belongs"
        raise ValueError(msg)
    return record.state


def _pairs(entries: Any) -> list[tuple[Any, Any]]:
    """Return the items of a pickled dict."""
    match entries:
        case Entries():
            return entries.pairs
        case Record(name="collections.OrderedDict", args=(), state=None):
            return []
        case _:
            msg = "there is no dict where one belongs"
            raise TypeError(msg)


def _size(record: Any) -> tuple[int, ...]:
    """Return the lengths in a pickled ``torch.Size``."""
    match record:
        case Record(name="torch.Size", args=(tuple() | list() as sizes,)):
            return _sizes(tuple(sizes))
        case _:
            msg = "there is no torch.Size where one belongs"
            raise TypeError(msg)


def _sizes(values: tuple[Any, ...]) -> tuple[int, ...]:
    if not are_sizes(*values):
        msg = "it has something else where sizes belong"
        raise ValueError(msg)
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        msg = "it has something else where a name belongs"
        raise TypeError(msg)
    return value
