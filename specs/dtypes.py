"""The element types of tensors, by torch's names, without torch."""

from __future__ import annotations

import re
from decimal import Decimal

_SHORT_AND_BYTES = {
    "float64": ("f64", 8),
    "float32": ("f32", 4),
    "bfloat16": ("bf16", 2),
    "float16": ("f16", 2),
    "float8_e4m3fn": ("f8e4m3", 1),
    "float8_e5m2": ("f8e5m2", 1),
    "complex128": ("c128", 16),
    "complex64": ("c64", 8),
    "int64": ("i64", 8),
    "int32": ("i32", 4),
    "int16": ("i16", 2),
    "int8": ("i8", 1),
    "uint8": ("u8", 1),
    "bool": ("bool", 1),
}


_KIB = 1024
_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]i?b|b)?", flags=re.IGNORECASE | re.ASCII)


def is_known(dtype: str) -> bool:
    """Tell whether plans support ``dtype``.

    >>> is_known("bfloat16"), is_known("quint4x2")
    (True, False)
    """
    return dtype in _SHORT_AND_BYTES


def short_name(dtype: str) -> str:
    """Return the name of ``dtype`` in the printed form of a tensor's type.

    >>> short_name("bfloat16")
    'bf16'
    """
    return _SHORT_AND_BYTES[dtype][0]


def num_bytes(dtype: str) -> int:
    """Return the bytes of an element of ``dtype``.

    >>> num_bytes("float32")
    4
    """
    return _SHORT_AND_BYTES[dtype][1]


def human_bytes(count: float) -> str:
    """Write a number of bytes for a person, in binary units.

    >>> human_bytes(512), human_bytes(8 * 2**20), human_bytes(1536)
    ('512 B', '8.0 MiB', '1.5 KiB')
    """
    if count < _KIB:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= _KIB
        if round(count, 1) < _KIB:
            return f"{count:.1f} {unit}"
    return f"{count / _KIB:.1f} TiB"


def parse_bytes(text: str) -> int:
    """Return the bytes of a size: GiB is 2**30, GB is 10**9, a number alone is bytes; a fraction of a byte is dropped.

    Raises:
        ValueError: If it is no size.

    >>> parse_bytes("80GiB"), parse_bytes("1.5 TB"), parse_bytes(human_bytes(8 * 2**20))
    (85899345920, 1500000000000, 8388608)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        msg = f"{text!r} is no size in bytes: write 80GiB (80 * 2**30) or 80GB (80 * 10**9)"
        raise ValueError(msg)
    number, unit = match.groups()
    return int(Decimal(number) * _UNITS[(unit or "B").lower()])
