"""Files that somebody else wrote: opened only if regular, names kept within the folder, JSON without repeated keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from ....specs.errors import PlanError, Problem

AGAIN = "Copy or download it again"

MAX_BYTES = 100_000_000
"""Longest JSON that is read: the limit of a safetensors header; the index of a million tensors is shorter."""


@contextmanager
def open_regular(folder: str, name: str, fix: str = AGAIN, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Open a regular file of a checkpoint; an ``OSError`` in the block becomes a ``PlanError`` that names the file.

    Raises:
        PlanError: If the file is missing, not regular, or cannot be read.
    """
    path = Path(folder) / name
    try:
        if not S_ISREG(path.stat().st_mode):  # opening a pipe would block
            raise PlanError([Problem(name, f"it is no file: {path}", fix)])
        with path.open("rb", buffering=buffering) as file:
            yield file
    except OSError as error:
        raise PlanError([Problem(name, f"{error.strerror}: {path}", fix)]) from None


def is_plain_name(name: str) -> bool:
    r"""Tell whether a name cannot lead out of its folder: no separator, not empty, not ``.`` or ``..``.

    >>> is_plain_name("__0_0.distcp"), is_plain_name("../model.safetensors"), is_plain_name("..")
    (True, False, False)
    """
    return name not in {"", ".", ".."} and not set("/\\\0") & set(name)


def are_sizes(*values: Any) -> bool:
    """Tell whether all values are integers from 0 up to 2^63: lengths, offsets and strides of arrays.

    >>> are_sizes(0, 4), are_sizes(-1), are_sizes(True), are_sizes(2**63)
    (True, False, False, False)
    """
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_object(folder: str, name: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        PlanError: If the file is missing, too long, or holds no JSON object.
    """
    with open_regular(folder, name) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise PlanError([Problem(name, f"it has more than {MAX_BYTES} bytes", AGAIN)])
    try:
        return parse_object(text)
    except ValueError as error:
        raise PlanError([Problem(name, f"it is damaged: {error}", AGAIN)]) from None


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no key is repeated.

    Raises:
        ValueError: If the text is no such object; the message says why.

    >>> parse_object(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' is there twice
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except RecursionError:
        msg = "it is nested too deep"
        raise ValueError(msg) from None
    if not isinstance(found, dict):
        msg = f"it is a {type(found).__name__}, not an object"
        raise ValueError(msg)  # noqa: TRY004  the content of a file is a value
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        msg = f"key {twice!r} is there twice"
        raise ValueError(msg)
    return found
