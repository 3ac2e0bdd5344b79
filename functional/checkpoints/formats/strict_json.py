"""JSON of others: an object, no key twice, not without end. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ....specs.errors import PlanError, Problem

MAX_BYTES = 100_000_000
"""More than this is not read: so much safetensors allows a header, and an index of a million tensors has less."""


def read_object(folder: str, name: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        folder: The folder.
        name: The file's path within it.

    Raises:
        PlanError: If there is none.
    """
    path = Path(folder) / name
    try:
        if not path.is_file():
            raise PlanError([Problem(name, f"it is no file: {path}", "Copy or download it again")])
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise PlanError([Problem(name, f"it has more than {MAX_BYTES} bytes", "Copy or download it again")])
        return parse_object(text)
    except OSError as error:
        raise PlanError([Problem(name, f"{error.strerror}: {path}", "Copy or download it again")]) from None
    except ValueError as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError([Problem(name, f"it is damaged: {error}", "Copy or download it again")]) from None


def parse_object(text: bytes) -> dict[str, Any]:
    """Return a JSON object, of which no key may be there twice.

    Raises:
        ValueError: If it is none; the text says why.

    >>> parse_object(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' is there twice
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError:
        msg = "it is nested too deep"
        raise ValueError(msg) from None
    if not isinstance(found, dict):
        msg = f"it is a {type(found).__name__}, not an object"
        raise ValueError(msg)  # noqa: TRY004  what a file holds is a value
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        msg = f"key {twice!r} is there twice"
        raise ValueError(msg)
    return found
