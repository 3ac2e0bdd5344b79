"""Save a folder from all ranks: rank 0 writes, and after an error no rank waits for another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from typing import ParamSpec as Arguments

import torch
from attrs import Factory, define, frozen
from torch import Tensor

from ..checkpoints.formats.manifest import FORMAT, NAME
from ..interpreter.world import agree
from .atomic import abandon_folder, begin_folder, finish_folder, partial_of
from .messages import messages_on
from .safetensors import FileLayout, bytes_of, sum_of

if TYPE_CHECKING:
    from ...specs.plan import Plan

R = TypeVar("R")
P = Arguments("P")


@frozen
class FileToWrite:
    """A file of tensors to be written.

    Args:
        name: The file's name.
        types: Dtype and shape of its tensors by key.
        layout: The layout of the file.
        collect: Collects the tensor of a key from all ranks, into the given tensor on rank 0 (None to drop it); every rank
            calls it for every key, in order.
    """

    name: str
    types: Mapping[str, tuple[str, tuple[int, ...]]]
    layout: FileLayout
    collect: Callable[[str, Tensor | None], None]


@define
class CollectiveSave:
    """A folder being written, and the first error; after an error nothing is written, but every rank takes part.

    Args:
        folder: The folder that will appear.
        is_writer: Whether this is rank 0.
        error: The first error on this rank.
        has_begun: Whether a partial folder has to be removed after an error.
        sizes: Length of each file in bytes.
        sums: Checksums of the tensors in each file, by key.
    """

    folder: Path
    is_writer: bool
    error: BaseException | None = None
    has_begun: bool = False
    sizes: dict[str, int] = Factory(dict)
    sums: dict[str, dict[str, str]] = Factory(dict)

    def attempt(self, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Run the action unless an earlier action failed; keep the first error."""
        if self.error is not None:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  other ranks wait for the messages to come
            self.error = error
            return None

    def agree(self, plan: Plan) -> None:
        """Raise the first error of any rank on all ranks; the partial folder is removed then."""
        try:
            agree(plan, self.error, messages_on())
        except BaseException:
            if self.has_begun:
                abandon_folder(self.folder)
            raise

    def begin(self) -> None:
        """Begin the partial folder."""
        if self.is_writer:
            self.has_begun = self.attempt(begin_folder, self.folder) is not None

    def write(self, file: FileToWrite) -> None:
        """Write a file, one tensor after another; each is freed before the next is allocated."""
        stream = self.attempt(self._opened, file) if self.is_writer else None
        for key in file.layout.starts:
            dtype, shape = file.types[key]
            whole = None if stream is None else self.attempt(torch.empty, shape, dtype=getattr(torch, dtype))
            try:
                file.collect(key, whole)
            except Exception as error:  # noqa: BLE001  the other ranks wait for the messages still to come
                self.error = self.error or error
            if stream is not None and whole is not None:
                self.attempt(self._put, stream, file.name, key, whole)
            del whole
        if stream is not None:
            self.attempt(stream.flush)
            with suppress(OSError):  # flush has reported the error
                stream.close()

    def finish(self, describe: Callable[[Path], None], training: Mapping[str, Any] | None) -> None:
        """Write descriptions of the tensors, the manifest and its record of the training last; let the folder appear."""
        if self.is_writer:
            self.attempt(describe, partial_of(self.folder))
            self.attempt(self._write_manifest, training)
            self.attempt(finish_folder, self.folder)

    def _opened(self, file: FileToWrite) -> IO[bytes]:
        self.sums[file.name], self.sizes[file.name] = {}, file.layout.num_bytes
        stream = (partial_of(self.folder) / file.name).open("wb")
        stream.write(file.layout.header)
        return stream

    def _put(self, stream: IO[bytes], name: str, key: str, tensor: Tensor) -> None:
        stream.write(bytes_of(tensor))
        self.sums[name][key] = f"{sum_of(tensor):016x}"

    def _write_manifest(self, training: Mapping[str, Any] | None) -> None:
        manifest: dict[str, Any] = {"format": FORMAT, "files": self.sizes, "tensors": self.sums}
        if training is not None:
            manifest["training"] = training
        (partial_of(self.folder) / NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
