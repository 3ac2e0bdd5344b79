"""Real processes for real claims: a function run by several ranks, with gloo on loopback."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import tempfile
import traceback
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

from attrs import frozen

from tests.helpers.processes import TIMEOUT

COLLECTIVE_TIMEOUT = timedelta(seconds=TIMEOUT / 2)
"""Shorter, so that a rank that waits for another says in which collective."""


@frozen
class Outcome:
    """What one rank ended with: a result, or the error's type and text."""

    result: object = None
    error: str = ""
    trace: str = ""


def run_ranks(job, num_ranks, *args, shared=None, grouped=True):
    """Return the outcome of ``job(rank, *args)`` for each of ``num_ranks`` processes; none is left behind.

    They are forked from a process that has imported everything, so that each is fresh and starts at once. What all of them
    would make anew, such as the plan of an exported model, is made once, before they part, by ``shared(*args)``; then the
    job is ``job(rank, shared, *args)``. Unless they are to be ``grouped`` the job makes the process group itself.
    """
    return run_each(job, [(num_ranks, args)], shared=shared, grouped=grouped)[0]


def run_each(job, launches, *, shared=None, grouped=True):
    """Run a job for each number of ranks and arguments, one after another, each on fresh ranks; return the outcomes of each.

    The process that forks them exports models that are planned alike once.
    """
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(number)) for number in range(len(launches))]
        family = context.Process(target=_fork_each, args=(job, launches, folders, shared, grouped), daemon=True)
        family.start()
        try:
            family.join(TIMEOUT * len(launches))
            return [_outcomes(family, folder, num_ranks) for folder, (num_ranks, _) in zip(folders, launches, strict=True)]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(family.pid, signal.SIGKILL)  # also of what ranks have started
            family.kill()
            family.join()


def _outcomes(family, folder, num_ranks):
    files = [folder / f"{rank}.pkl" for rank in range(num_ranks)]
    missing = [rank for rank, file in enumerate(files) if not file.exists()]
    assert not (missing and family.is_alive()), f"ranks {missing} were still running after {TIMEOUT} s"
    assert not missing, f"the process that starts the ranks ended with exit code {family.exitcode}"
    return [pickle.loads(file.read_bytes()) for file in files]


def run_script(script, num_ranks, folder, **environment):
    """Run a script on ranks in a folder, as torchrun does; return what they print, in the order in which they do."""
    printed = Path(folder, "printed.txt")
    results(run_ranks(_run_script, num_ranks, script, folder, environment, printed, shared=_serve_store, grouped=False))
    return printed.read_text()


def _serve_store(*_):
    """Serve the ranks' store from the process that they are forked from, as torchrun's own process does; return its port."""
    import torch.distributed as dist

    _serve_store.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return _serve_store.store.port


def _run_script(rank, port, script, folder, environment, printed):
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", **environment)
    sys.path[0] = str(Path(script).parent)
    with printed.open("a", buffering=1) as out, redirect_stdout(out):
        runpy.run_path(str(script), run_name="__main__")


def results(outcomes):
    """Return the results of all ranks; fail with the first rank's trace if one has an error."""
    for rank, outcome in enumerate(outcomes):
        assert not outcome.error, f"rank {rank}: {outcome.trace}"
    return [outcome.result for outcome in outcomes]


def _fork_each(job, launches, folders, shared, grouped):
    import torch

    from tests.helpers.exports import share_exports

    os.setpgid(0, 0)  # so that it is ended together with its ranks
    torch.set_num_threads(1)
    share_exports()
    for folder, (num_ranks, args) in zip(folders, launches, strict=True):
        folder.mkdir()
        try:
            given = args if shared is None else (shared(*args), *args)
        except Exception as error:
            for rank in range(num_ranks):
                _write(folder, rank, _failed(error))
            continue
        _fork(job, num_ranks, folder, given, grouped)


def _fork(job, num_ranks, folder, args, grouped):
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if not child:
            _enter(job, rank, num_ranks, folder, args, grouped)
        children.append(child)
    for rank, child in enumerate(children):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not Path(folder, f"{rank}.pkl").exists():
            text = f"the process ended with exit code {code}"
            _write(folder, rank, Outcome(error=text, trace=text))


def _enter(job, rank, num_ranks, folder, args, grouped):
    try:
        import torch.distributed as dist

        os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks))
        if grouped:
            store = dist.FileStore(f"{folder}/store", num_ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=COLLECTIVE_TIMEOUT)
        try:
            outcome = Outcome(result=job(rank, *args))
        except Exception as error:
            outcome = _failed(error)
        _write(folder, rank, outcome)
        os._exit(0)  # no destroy_process_group: a rank that failed must not wait for the others
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _failed(error):
    return Outcome(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def _write(folder, rank, outcome):
    partial = folder / f"{rank}.part"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(folder / f"{rank}.pkl")
