"""What a safetensors file says of itself: eight bytes of length, then JSON; nothing in it is taken on trust. No torch.

https://github.com/huggingface/safetensors#format: little-endian length of the header; the header, for each key its dtype,
shape and the bytes of the buffer behind the header; the tensors fill that buffer without a hole.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from frozendict import frozendict

from ....specs.dtypes import is_known, num_bytes
from ....specs.errors import PlanError, Problem
from ....specs.stored import StoredFile, StoredTensor
from .strict_json import MAX_BYTES, parse_object

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
"""torch's names of the element types, by those in the header."""

_LENGTH = struct.Struct("<Q")
_MAX_BYTES = 2**63
_AGAIN = "Copy or download the file again"


def read_header(folder: str, name: str) -> tuple[StoredFile, dict[str, StoredTensor]]:
    """Return a file with the digest of its header, and the tensors in it by key, in the order of their bytes.

    The digest is the SHA-256 of the JSON, without the length before it.

    Args:
        folder: The folder.
        name: The file's path within it.

    Raises:
        PlanError: If the file is not there, cut off, or not what the format allows.
    """
    path = Path(folder) / name
    try:
        if not S_ISREG(path.stat().st_mode):  # a pipe, which opening would wait for
            raise PlanError([Problem(name, f"it is no file: {path}", _AGAIN)])
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = header_bytes(file, size)
    except OSError as error:
        raise PlanError([Problem(name, f"{error.strerror}: {path}", _AGAIN)]) from None
    except ValueError as error:
        raise PlanError([Problem(name, str(error), _AGAIN)]) from None
    tensors, problems = _tensors(name, header, _LENGTH.size + len(header), size)
    if problems:
        raise PlanError(problems)
    return StoredFile(name, size, sha256(header).hexdigest()), tensors


def header_bytes(file: IO[bytes], size: int) -> bytes:
    """Return the JSON at the beginning of a file of ``size`` bytes; no more than the file has is ever asked for.

    Raises:
        ValueError: If the file cannot have such a header; the text says why.

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


def _tensors(name: str, header: bytes, start: int, size: int) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """Return the tensors of a file of ``size`` bytes whose buffer begins at byte ``start``, and what is wrong."""
    try:
        entries = parse_object(header)
    except ValueError as error:
        return {}, [Problem(name, f"its header is damaged: {error}", _AGAIN)]
    entries.pop("__metadata__", None)
    found: list[tuple[int, int, StoredTensor]] = []
    problems: list[Problem] = []
    for key, entry in entries.items():
        try:
            begin, end, shape, dtype = _entry(entry)
        except ValueError as error:
            problems.append(Problem(key, f"in {name} {error}", _AGAIN))
        else:
            found.append((begin, end, StoredTensor(name, key, start + begin, shape, dtype)))
    found.sort(key=lambda one: one[:2])
    if not problems:
        problems = list(_holes(name, found, size - start))
    return {stored.key: stored for *_, stored in found}, problems


def _entry(entry: Any) -> tuple[int, int, tuple[int, ...], str]:
    """Return where in the buffer a tensor begins and ends, its shape and its dtype."""
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


def _holes(name: str, found: list[tuple[int, int, StoredTensor]], size: int) -> Iterator[Problem]:
    """Iterate over where tensors do not follow one another, or not to the end of a buffer of ``size`` bytes."""
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
