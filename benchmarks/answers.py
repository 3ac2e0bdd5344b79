"""Measure answers about saved plans that are to come at once: CPU seconds of a fresh process for each, without torch.

``python benchmarks/answers.py`` plans a Llama of 6.7 billion parameters on 64 ranks, and runs commands on the saved plan.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile

NUM_REPETITIONS = 5
PLAN = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from shardplan.functional import plan_build
from shardplan.functional.frontends import schedule_from_tp_plan
from shardplan.specs import Mesh, dumps
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig())
Path(sys.argv[1]).write_text(dumps(plan_build(schedule_from_tp_plan(model, Mesh(data=8, tensor=8)))))
"""
NEAREST = """
import sys
from pathlib import Path
from shardplan.functional import nearest_meshes
from shardplan.specs import loads
print(nearest_meshes(loads(Path(sys.argv[1]).read_text()), 2**30, 8))
"""
COMMAND = "import sys; from shardplan.functional.cli import main; main(sys.argv[1:])"


def seconds(code: str, *arguments: str) -> float:
    """Return the CPU seconds of a fresh process that runs some code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, check=False)  # noqa: S603
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure every answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/plan.json"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
        subprocess.run([sys.executable, "-c", PLAN, path], env=environment, check=True)  # noqa: S603
        answers = {
            "python": ("",),
            "show": (COMMAND, "show", path),
            "audit": (COMMAND, "audit", path),
            "audit --rank": (COMMAND, "audit", path, "--rank", "63"),
            "explain": (COMMAND, "explain", path, "lm_head.weight"),
            "diff": (COMMAND, "diff", path, path),
            "nearest_meshes": (NEAREST, path),
        }
        print("| answer | CPU seconds |", "| --- | ---: |", sep="\n")
        for name, (code, *arguments) in answers.items():
            found = statistics.median(seconds(code, *arguments) for _ in range(NUM_REPETITIONS))
            print(f"| {name} | {found:.2f} |", flush=True)


if __name__ == "__main__":
    main()
