"""A folder that all ranks save together: rank 0 writes, and whatever fails, none waits for another."""

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
from .atomic_folder import abandon, begin, finish, partial_of
from .messages import messages_on
from .safetensors import Layout
from .tensor_bytes import bytes_of, sum_of

if TYPE_CHECKING:
    from ...specs.plan import Plan

R = TypeVar("R")
P = Arguments("P")


@frozen
class File:
    """A file that is written.

    Args:
        name: Its name.
        types: Dtype and shape of its tensors by key.
        where: Where they lie in it.
        bring: Fills a tensor on rank 0, where one is given; every rank calls it for every key, in their order.
    """

    name: str
    types: Mapping[str, tuple[str, tuple[int, ...]]]
    where: Layout
    bring: Callable[[str, Tensor | None], None]


@define
class Saving:
    """A folder that is written, and the first thing that went wrong; after that nothing is written, but all take part.

    Args:
        folder: Where it will be.
        is_writer: Whether this is rank 0.
        error: What went wrong.
        has_begun: Whether there is something to remove then.
        sizes: Bytes of each file.
        sums: Sums of the tensors in each file, by key.
    """

    folder: Path
    is_writer: bool
    error: BaseException | None = None
    has_begun: bool = False
    sizes: dict[str, int] = Factory(dict)
    sums: dict[str, dict[str, str]] = Factory(dict)

    def attempt(self, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Do something, unless something went wrong before."""
        if self.error is not None:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever fails here, others wait for the messages to come
            self.error = error
            return None

    def agree(self, plan: Plan) -> None:
        """Raise the first error of any rank on all; then nothing is left of what was written."""
        try:
            agree(plan, self.error, messages_on())
        except BaseException:
            if self.has_begun:
                abandon(self.folder)
            raise

    def begin(self) -> None:
        """Make room for the folder."""
        if self.is_writer:
            self.has_begun = self.attempt(begin, self.folder) is not None

    def write(self, file: File) -> None:
        """Write a file, one tensor after another; each is let go before there is room for the next."""
        stream = self.attempt(self._opened, file) if self.is_writer else None
        for key in file.where.starts:
            dtype, shape = file.types[key]
            whole = None if stream is None else self.attempt(torch.empty, shape, dtype=getattr(torch, dtype))
            try:
                file.bring(key, whole)
            except Exception as error:  # noqa: BLE001  the other ranks wait for what is still to come
                self.error = self.error or error
            if stream is not None and whole is not None:
                self.attempt(self._put, stream, file.name, key, whole)
            del whole
        if stream is not None:
            self.attempt(stream.flush)
            with suppress(OSError):  # flush has told
                stream.close()

    def finish(self, describe: Callable[[Path], None], training: Mapping[str, Any] | None) -> None:
        """Write what is said of the tensors, the manifest last, and let the folder appear.

        Args:
            describe: Writes all but the manifest to a folder.
            training: What the manifest notes of the training.
        """
        if self.is_writer:
            self.attempt(describe, partial_of(self.folder))
            self.attempt(self._write_manifest, training)
            self.attempt(finish, self.folder)

    def _opened(self, file: File) -> IO[bytes]:
        self.sums[file.name], self.sizes[file.name] = {}, file.where.num_bytes
        stream = (partial_of(self.folder) / file.name).open("wb")
        stream.write(file.where.header)
        return stream

    def _put(self, stream: IO[bytes], name: str, key: str, tensor: Tensor) -> None:
        stream.write(bytes_of(tensor))
        self.sums[name][key] = f"{sum_of(tensor):016x}"

    def _write_manifest(self, training: Mapping[str, Any] | None) -> None:
        manifest: dict[str, Any] = {"format": FORMAT, "files": self.sizes, "tensors": self.sums}
        if training is not None:
            manifest["training"] = training
        (partial_of(self.folder) / NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
