"""Locate the bytes of tensors in a file of ``torch.save``, without unpickling.

The file is a zip of uncompressed records: ``data.pkl`` has dtype, shape and strides of each tensor, and names the record
with its elements, ``data/0``.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from typing import IO, Any

from attrs import define, frozen
from frozendict import frozendict

from ....specs.dtypes import is_known, num_bytes
from ....specs.errors import PlanError, Problem
from ....specs.index import row_major
from ....specs.stored import StoredTensor
from .inert_pickle import Global, Persistent, Record, read_pickle
from .untrusted import AGAIN, are_sizes, open_regular

_STORAGES: Mapping[str, str] = frozendict(
    {
        "torch.DoubleStorage": "float64",
        "torch.FloatStorage": "float32",
        "torch.BFloat16Storage": "bfloat16",
        "torch.HalfStorage": "float16",
        "torch.ComplexDoubleStorage": "complex128",
        "torch.ComplexFloatStorage": "complex64",
        "torch.LongStorage": "int64",
        "torch.IntStorage": "int32",
        "torch.ShortStorage": "int16",
        "torch.CharStorage": "int8",
        "torch.ByteStorage": "uint8",
        "torch.BoolStorage": "bool",
    }
)
_UNTYPED = "torch.storage.UntypedStorage"
_TENSOR, _TENSOR_OF_DTYPE, _PARAMETER = (f"torch._utils._rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter"))
DTYPES = frozenset(f"torch.{name}" for name in (*_STORAGES.values(), "float8_e4m3fn", "float8_e5m2"))
"""Names of element types in a pickle."""

_GLOBALS = DTYPES | _STORAGES.keys() | {_UNTYPED, _TENSOR, _TENSOR_OF_DTYPE, _PARAMETER, "collections.OrderedDict"}
_MAX_BYTES = 2**20  # longest pickle of one tensor
_LOCAL = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field before the record


@frozen(eq=False)
class SavedObject:
    """An object that ``torch.save`` wrote.

    Args:
        file: Name of the file.
        value: The object, as ``read_pickle`` returns it.
        records: First byte and length of each tensor record in the file, by name.
    """

    file: str
    value: Any
    records: Mapping[str, tuple[int, int]]

    def tensor(self, key: str, value: Any) -> StoredTensor:
        """Locate the elements of a tensor that the pickle describes as ``value``.

        Raises:
            PlanError: If ``value`` is no tensor, or the tensor is not contiguous.
        """
        try:
            return self._tensor(key, value)
        except ValueError as error:
            raise PlanError([Problem(key, f"in {self.file} {error}", "Save it again, as a contiguous tensor")]) from None

    def _tensor(self, key: str, value: Any) -> StoredTensor:
        if isinstance(value, Record) and value.name == _PARAMETER and value.args:
            value = value.args[0]
        match value:
            case Record(
                name=str(name),
                args=(
                    Persistent(value=("storage", Global(name=storage), str(record), str(), int(count))),
                    int(first),
                    tuple(shape),
                    tuple(strides),
                    bool(),
                    Record(),
                    *dtypes,
                ),
            ) if are_sizes(count, first, *shape, *strides) and len(shape) == len(strides):
                pass
            case _:
                msg = "is no dense tensor as torch.save writes it"
                raise ValueError(msg)
        dtype = _dtype(name, storage, dtypes)
        item = num_bytes(dtype)
        if record not in self.records:
            msg = f"its elements are to be in the record data/{record[:40]}, which is not there"
            raise ValueError(msg)
        begin, size = self.records[record]
        if size != count * (1 if storage == _UNTYPED else item):
            msg = f"its record data/{record} has {size} bytes, and {count} elements of {storage} do not take as many"
            raise ValueError(msg)
        in_order = zip(shape, strides, row_major(tuple(shape)), strict=True)
        if 0 not in shape and any(stride != wanted for length, stride, wanted in in_order if length > 1):
            msg = f"its elements do not lie one after another: shape {list(shape)}, strides {list(strides)}"
            raise ValueError(msg)
        wanted = item * prod(shape)
        if first * item + wanted > size:
            msg = f"its {wanted} bytes from byte {first * item} on are not within the {size} of record data/{record}"
            raise ValueError(msg)
        return StoredTensor(self.file, key, begin + first * item, tuple(shape), dtype)


def read_saved(
    folder: str, file: str, names: frozenset[str] = frozenset(), place: tuple[int, int] | None = None
) -> SavedObject:
    """Read the object that ``torch.save`` wrote to a file, or to the byte range ``place`` of it: first byte and length.

    The pickle may name the globals in ``names`` besides those of tensors.

    Raises:
        PlanError: If the file is missing, cut off, damaged, compressed, or could run code.
    """
    with open_regular(folder, file, buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        begin, length = (0, size) if place is None else place
        if begin + length > size:
            cause = f"it is cut off: bytes {begin} to {begin + length} are wanted, and it has {size}"
            raise PlanError([Problem(file, cause, AGAIN)])
        try:
            pickle, records = _unzipped(opened, begin, length)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, struct.error, OverflowError) as error:
            cause = f"it is no zip as torch.save writes it: {error}"
            raise PlanError([Problem(file, cause, f"{AGAIN}; or save it again with a torch of today")]) from None
    return SavedObject(file, read_pickle(pickle, file, _GLOBALS | names, _MAX_BYTES), records)


def _unzipped(opened: IO[bytes], begin: int, length: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the pickle, and the first byte and length of each tensor record, by name."""
    with zipfile.ZipFile(io.BufferedReader(_ByteRange(opened, begin, length), 2**12)) as archive:
        found = {info.filename: info for info in archive.infolist()}
        if len(found) < len(archive.infolist()):
            msg = "a record is in it twice"
            raise ValueError(msg)
        pickles = [name for name in found if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            msg = f"it has {len(pickles)} records data.pkl"
            raise ValueError(msg)
        root = pickles[0].removesuffix("data.pkl")
        wanted = [name for name in found if name.startswith(f"{root}data/")]
        for name in (*pickles, *wanted):
            info = found[name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                msg = f"its record {name} is compressed or encrypted"
                raise ValueError(msg)
        if f"{root}byteorder" in found and archive.read(f"{root}byteorder")[:8] != b"little":
            msg = "its numbers do not have their lowest byte first"
            raise ValueError(msg)
        if found[pickles[0]].file_size > _MAX_BYTES:
            msg = f"its record data.pkl has {found[pickles[0]].file_size} bytes, and {_MAX_BYTES} are the most that is read"
            raise ValueError(msg)
        places = {name.removeprefix(f"{root}data/"): _place(opened, found[name], begin, length) for name in wanted}
        return archive.read(pickles[0]), places


def _place(opened: IO[bytes], info: zipfile.ZipInfo, begin: int, length: int) -> tuple[int, int]:
    """Return the first byte of a record in the file, and its length."""
    opened.seek(begin + info.header_offset)
    header = opened.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        msg = f"its record {info.filename} is cut off"
        raise ValueError(msg)
    signature, num_name, num_extra = _LOCAL.unpack(header)
    at = info.header_offset + _LOCAL.size + num_name + num_extra
    if signature != b"PK\3\4" or opened.read(num_name) != info.filename.encode() or at + info.file_size > length:
        msg = f"its record {info.filename} is not where its directory has it"
        raise ValueError(msg)
    return begin + at, info.file_size


@define(eq=False, slots=False)
class _ByteRange(io.RawIOBase):
    """A byte range of a file, as a file of its own."""

    opened: IO[bytes]
    begin: int
    length: int
    at: int = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            msg = f"byte {start + offset} is before its beginning"
            raise ValueError(msg)
        self.at = start + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.opened.seek(self.begin + self.at)
        found = self.opened.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def _dtype(name: str, storage: str, dtypes: list[Any]) -> str:
    """Return the element type of a tensor."""
    match name, dtypes:
        case (str(), []) if name == _TENSOR and storage in _STORAGES:
            return _STORAGES[storage]
        case (str(), [Global(name=dtype)]) if name == _TENSOR_OF_DTYPE and is_known(dtype.removeprefix("torch.")):
            return dtype.removeprefix("torch.")
        case _:
            msg = f"its elements are of no type that plans know: {storage}"
            raise ValueError(msg)
