"""The header of a safetensors file: eight bytes of length, then JSON. Nothing in it is taken on trust.

https://github.com/huggingface/safetensors#format: little-endian length of the header; the header, which has for each key
the dtype, the shape and the byte range in the buffer behind the header; the tensors fill that buffer without a gap.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from hashlib import sha256
from operator import itemgetter
from typing import IO, Any, NamedTuple

from frozendict import frozendict

from ....specs.dtypes import is_known, num_bytes
from ....specs.errors import PlanError, Problem
from ....specs.stored import StoredFile, StoredTensor
from .untrusted import MAX_BYTES, open_regular, parse_object

DTYPES: Mapping[str, str] = frozendict(
    {
        "F64": "float64",
        "F32": "float32",
        "BF16": "bfloat16",
        "F16": "float16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "C64": "complex64",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "BOOL": "bool",
    }
)
"""torch's names of the element types, by their names in a header."""

_LENGTH = struct.Struct("<Q")
_MAX_BYTES = 2**63
_AGAIN = "Copy or download the file again"


class Header(NamedTuple):
    """The header of a safetensors file.

    Args:
        file: The file, with the SHA-256 of the JSON, without the length before it.
        tensors: Its tensors by key, in the order of their bytes.
        metadata: The entry ``__metadata__``, unchecked; an empty dict if there is none.
    """

    file: StoredFile
    tensors: dict[str, StoredTensor]
    metadata: Any


def read_header(folder: str, name: str) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        PlanError: If the file is missing, cut off, or violates the format.
    """
    with open_regular(folder, name, _AGAIN) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            header = header_bytes(file, size)
        except ValueError as error:
            raise PlanError([Problem(name, str(error), _AGAIN)]) from None
    try:
        entries = parse_object(header)
    except ValueError as error:
        raise PlanError([Problem(name, f"its header is damaged: {error}", _AGAIN)]) from None
    metadata = entries.pop("__metadata__", {})
    tensors = _tensors(name, entries, _LENGTH.size + len(header), size)
    return Header(StoredFile(name, size, sha256(header).hexdigest()), tensors, metadata)


def header_bytes(file: IO[bytes], size: int) -> bytes:
    """Read the JSON at the beginning of a file of ``size`` bytes; never ask for more bytes than the file has.

    Raises:
        ValueError: If the file cannot have such a header; the message says why.

    >>> from io import BytesIO
    >>> header_bytes(BytesIO((2).to_bytes(8, "little") + b"{}"), 10)
    b'{}'
    """
    if size < _LENGTH.size:
        msg = f"it is cut off: of the {_LENGTH.size} bytes that a safetensors file begins with it has {size}"
        raise ValueError(msg)
    (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
    if length > MAX_BYTES:
        msg = f"it is no safetensors file: it begins with a length of {length} bytes, and {MAX_BYTES} are the most"
        raise ValueError(msg)
    if length > size - _LENGTH.size:
        msg = f"it is cut off: its header has {length} bytes, and {size - _LENGTH.size} of them are there"
        raise ValueError(msg)
    return _exactly(file, length)


def _exactly(file: IO[bytes], count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        msg = f"it is cut off: of {count} bytes of its header {len(found)} can be read"
        raise ValueError(msg)
    return found


def _tensors(name: str, entries: Mapping[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
    """Return the tensors of a file of ``size`` bytes whose buffer begins at byte ``start``."""
    found: list[tuple[int, int, StoredTensor]] = []
    problems: list[Problem] = []
    for key, entry in entries.items():
        try:
            begin, end, shape, dtype = _entry(entry)
        except ValueError as error:
            problems.append(Problem(key, f"in {name} {error}", _AGAIN))
        else:
            found.append((begin, end, StoredTensor(name, key, start + begin, shape, dtype)))
    found.sort(key=itemgetter(0, 1))
    if problems := problems or list(_gaps(name, found, size - start)):
        raise PlanError(problems)
    return {stored.key: stored for *_, stored in found}


def _entry(entry: Any) -> tuple[int, int, tuple[int, ...], str]:
    """Return the first byte of a tensor in the buffer, the byte after its last, its shape and its dtype."""
    match entry:
        case {"dtype": str(written), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            pass
        case _:
            msg = "its header entry is damaged: it has no dtype, shape and data_offsets as the format has them"
            raise ValueError(msg)
    dtype = DTYPES.get(written, "")
    if not is_known(dtype):
        msg = f"it has dtype {written!r}, and those that can be read are {', '.join(DTYPES)}"
        raise ValueError(msg)
    count = num_bytes(dtype)
    for length in shape:
        count *= length
        if count > _MAX_BYTES:
            msg = f"it has shape {shape}, which no file holds"
            raise ValueError(msg)
    if end - begin != count:
        msg = f"its bytes are {begin} to {end}, and {written} of shape {shape} takes {count}"
        raise ValueError(msg)
    return begin, end, tuple(shape), dtype


def _gaps(name: str, found: list[tuple[int, int, StoredTensor]], size: int) -> Iterator[Problem]:
    """Iterate over problems if the tensors do not fill a buffer of ``size`` bytes without a gap."""
    at = 0
    for number, (begin, end, stored) in enumerate(found):
        if begin != at:
            cause = f"in {name} its bytes begin at {begin} of the buffer, and those before it end at {at}"
            yield Problem(stored.key, cause, _AGAIN)
            return
        if end > size:
            after = f", and {len(found) - number - 1} more tensors" if number + 1 < len(found) else ""
            cause = (
                f"{name} is cut off: this tensor's bytes are {begin} to {end} of a buffer of which {size} are there{after}"
            )
            yield Problem(stored.key, cause, _AGAIN)
            return
        at = end
    if at != size:
        yield Problem(name, f"its tensors end at byte {at} of the buffer, and {size} bytes are there", _AGAIN)
