"""Fresh processes that are the ranks of one run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

TIMEOUT_SECONDS = 300


class SampleError(RuntimeError):
    """A rank failed, or did not end in time."""


def run_ranks(num_ranks: int, work: Callable[..., T], *args: Any) -> list[T]:
    """Return what ``work(*args)`` gives in each of ``num_ranks`` fresh processes; none is left behind.

    Raises:
        SampleError: If a rank fails, or does not end in time.
    """
    context = multiprocessing.get_context("fork")  # they inherit imports, models and plans
    readers: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(num_ranks):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_enter, args=(writer, folder, rank, num_ranks, work, args), daemon=True)
                process.start()
                writer.close()
                readers.append(reader)
                processes.append(process)
            return _collect(readers)
        finally:
            for process in processes:
                process.kill()
                process.join(10)
            for reader in readers:
                reader.close()


def _collect(readers: list[Connection]) -> list[Any]:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    outcomes: dict[int, Any] = {}
    while len(outcomes) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in outcomes}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            msg = f"ranks {sorted(waiting.values())} were still running after {TIMEOUT_SECONDS} s"
            raise SampleError(msg)
        for reader in ready:
            assert isinstance(reader, Connection), "readers are connections"
            try:
                outcome, trace = reader.recv()
            except EOFError:
                outcome, trace = None, "the process ended without a word"
            if trace:
                msg = f"rank {waiting[reader]}: {trace}"
                raise SampleError(msg)
            outcomes[waiting[reader]] = outcome
    return [outcomes[rank] for rank in range(len(readers))]


def _enter(
    writer: Connection, folder: str, rank: int, num_ranks: int, work: Callable[..., object], args: tuple[Any, ...]
) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    limit = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=limit)
    try:
        outcome = work(*args)
        dist.barrier()
        writer.send((outcome, ""))
    except Exception:  # noqa: BLE001
        writer.send((None, traceback.format_exc()))
    # no destroy_process_group: a rank that failed must not wait for the others
    os._exit(0)
