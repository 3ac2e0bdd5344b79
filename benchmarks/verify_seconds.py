"""Measure ``verify``: seconds after imports, for small models of two layers, each in a fresh process.

``python -m benchmarks.verify_seconds`` prints medians of three runs. The first call of a process loads kernels; the second
shows what a further call costs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

NUM_REPETITIONS = 3
CASES = {
    "llama, tensor=2": ("llama", {"tensor": 2}),
    "llama, tensor=4": ("llama", {"tensor": 4}),
    "llama, data=2 tensor=2": ("llama", {"data": 2, "tensor": 2}),
    "llama, pipe=2 tensor=2": ("llama", {"pipe": 2, "tensor": 2}),
    "mixtral, tensor=2": ("mixtral", {"tensor": 2}),
    "gpt2, tensor=2": ("gpt2", {"tensor": 2}),
}


def main() -> None:
    """Print a table."""
    print(f"{'':24}{'first call':>12}{'second call':>13}")
    for name, (family, mesh) in CASES.items():
        runs = [_run(family, mesh) for _ in range(NUM_REPETITIONS)]
        first, second = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
        print(f"{name:24}{first:10.2f} s{second:11.2f} s")


def _run(family: str, mesh: dict[str, int]) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-m", __name__ if __name__ != "__main__" else "benchmarks.verify_seconds"]
    done = subprocess.run([*command, family, json.dumps(mesh)], capture_output=True, text=True, check=True)  # noqa: S603  this file
    return json.loads(done.stdout)


def measure(family: str, mesh: dict[str, int]) -> list[float]:
    """Return the seconds of two calls of ``verify`` in this process; all must agree with the whole model."""
    from shardplan.functional import verify
    from shardplan.specs import Mesh
    from tests.helpers import families

    sch = families.schedule_of(family, Mesh(**mesh))
    sch = sch.cut_evenly(mesh["pipe"]) if "pipe" in mesh else sch
    seconds: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        assert verify(sch).ok
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]))))
    else:
        main()
