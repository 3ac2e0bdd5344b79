"""Other programs that tests run: each with a generous time limit, and without a process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

TIMEOUT = 600
"""Seconds after which a process is taken to hang. No test may fail because a machine is slow."""


def run_program(command, *, folder=None, stderr=subprocess.PIPE, **environment):
    """Run a command to its end in a session of its own; end whatever is left of it; return it with its output as text."""
    with subprocess.Popen(
        [*map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            _end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_python(code, *arguments, **environment):
    """Run code in a fresh interpreter, which must succeed; return what it prints."""
    done = run_program([sys.executable, "-W", "ignore", "-c", code, *arguments], **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_on_terminal(command, **environment):
    """Run a command whose output and errors go to a terminal of 80 columns; return what the terminal shows."""
    ours, theirs = os.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    with subprocess.Popen([*map(str, command)], env=env, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        try:
            shown = b"".join(_chunks(ours))
            assert process.wait(timeout=TIMEOUT) == 0, shown.decode()
        finally:
            os.close(ours)
            _end(process)
    return shown.decode().replace("\r\n", "\n")


def _end(process):
    """End a process and its session; first by SIGTERM, on which torchrun ends its ranks, which are in other sessions."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _chunks(terminal):
    """Iterate over what is written to a terminal, until nothing has it open."""
    with suppress(OSError):  # how Linux says that nothing has it open
        while chunk := os.read(terminal, 65536):
            yield chunk
