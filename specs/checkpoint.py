"""Weights on disk that a model starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import field, frozen


def _patterns(given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        msg = f"patterns are several strings, such as ('score.*',), not {given!r}"
        raise TypeError(msg)
    return tuple(given)


@frozen
class Checkpoint:
    """A folder with the weights of a model: ``plan_build(sch, init_weights=Checkpoint("path/to/llama"))``.

    It is a Hugging Face folder (``model.safetensors``, or several files and their index), one of torch's distributed
    checkpoints (``.metadata`` and ``*.distcp``), or a universal checkpoint of DeepSpeed's.

    Args:
        folder: Its path.
        init: Patterns of the model's tensors that it may lack: the model's init code makes them.
        ignore: Patterns of its own keys that the model has no tensor for.
        dedupe: Whether ranks that hold the same read it once, and broadcast it along ``data``: for a file system that all
            of them share.

    >>> Checkpoint("llama", init=("score.*",)).folder
    'llama'
    """

    folder: str = field(converter=lambda folder: str(Path(folder)))
    init: tuple[str, ...] = field(default=(), converter=_patterns)
    ignore: tuple[str, ...] = field(default=(), converter=_patterns)
    dedupe: bool = False
