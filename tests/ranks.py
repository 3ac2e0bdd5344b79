"""Real processes for real claims: a function run by several ranks, with gloo on loopback."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

from attrs import frozen

_PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "deepspeed", "tests.models"]


@frozen
class Outcome:
    """What one rank ended with: a result, or the error's type and text."""

    result: object = None
    error: str = ""
    trace: str = ""


def run_ranks(job, num_ranks, *args, timeout=120, world_size=None):
    """Return the outcome of ``job(rank, *args)`` for each of ``num_ranks`` processes; none is left behind.

    The processes are forked from a server that has imported torch, so that each is fresh and starts at once.
    """
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_enter, args=(job, rank, world_size or num_ranks, folder, args), daemon=True)
            for rank in range(num_ranks)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
            assert not hung, f"ranks {hung} were still running after {timeout} s"
            return [_outcome(Path(folder, f"{rank}.pkl"), process) for rank, process in enumerate(processes)]
        finally:
            for process in processes:
                if process.pid is not None and process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join(10)


def results(outcomes):
    """Return the results of all ranks; fail with the first rank's trace if one has an error."""
    for rank, outcome in enumerate(outcomes):
        assert not outcome.error, f"rank {rank}: {outcome.trace}"
    return [outcome.result for outcome in outcomes]


def _outcome(path, process):
    if not path.exists():
        return Outcome(error=f"the process ended with exit code {process.exitcode}", trace=f"exit code {process.exitcode}")
    return pickle.loads(path.read_bytes())


def _enter(job, rank, world_size, folder, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        outcome = Outcome(result=job(rank, *args))
    except Exception as error:
        outcome = Outcome(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    partial = Path(folder, f"{rank}.part")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder, f"{rank}.pkl"))
    # no destroy_process_group: a rank that failed must not wait for the others
    os._exit(0)
