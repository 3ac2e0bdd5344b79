"""Measure planning and auditing of the largest models: seconds, and memory on top of building the model.

``python benchmarks/scale.py`` runs each case in a fresh process, three times, and prints medians. Saved plans are audited in
processes of their own, which do not import torch.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from shardplan.functional import audit
from shardplan.specs import Mesh, loads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

NUM_REPETITIONS = 3
MIB = 2**20
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}


@frozen
class Case:
    """A model on a mesh.

    Args:
        model: ``llama`` (405 billion parameters) or ``experts`` (a trillion: 61 layers of 384 experts).
        mesh: The ranks.
        length: Tokens of the micro-batch that is followed; 0 for none.
    """

    model: str
    mesh: Mesh
    length: int = 0

    def __str__(self) -> str:
        followed = f", {self.length} tokens followed" if self.length else ""
        return f"{self.model} on {self.mesh.num_ranks} ranks ({self.mesh}{followed})"


CASES = (
    Case("llama", Mesh(data=2048, tensor=8)),
    Case("llama", Mesh(data=2, tensor=8)),
    Case("llama", Mesh(data=2048, tensor=8), length=4096),
    Case("llama", Mesh(pipe=16, data=128, tensor=8), length=4096),
    Case("experts", Mesh(data=2048, tensor=8, expert=64)),
)


def llama() -> nn.Module:
    """Return a Llama with the sizes of Llama 3.1 405B, on meta."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "vocab_size": 128256}
    config: Any = LlamaConfig(**sizes, num_attention_heads=128, num_key_value_heads=8, dtype=torch.bfloat16)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def experts() -> nn.Module:
    """Return a mixture of experts with the sizes of Kimi K2, a trillion parameters, on meta."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61}
    routing = {"n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config: Any = DeepseekV3Config(**sizes, **routing, num_attention_heads=64, num_key_value_heads=64, vocab_size=163840)
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(config).to(torch.bfloat16)


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "experts": experts}


def plan_and_audit(number: int, path: str) -> dict[str, float]:
    """Plan and audit one case in this process, save the plan, and return what it took."""
    import torch

    from shardplan.functional import plan_build
    from shardplan.functional.frontends import schedule_from_tp_plan
    from shardplan.specs import dumps

    case = CASES[number]
    model = MODELS[case.model]()
    before = _peak()
    inputs = {"input_ids": torch.zeros(1, case.length, dtype=torch.long, device="meta"), "use_cache": False}
    config = {"schedule": "1f1b", "num_microbatches": 2 * case.mesh.pipe} if case.mesh.pipe > 1 else None
    start = time.perf_counter()
    sch = schedule_from_tp_plan(model, case.mesh)
    sch = sch.cut_evenly(case.mesh.pipe) if case.mesh.pipe > 1 else sch
    declared = time.perf_counter()
    plan = plan_build(sch, target="torch", config=config, example_inputs=inputs if case.length else None)
    planned = time.perf_counter()
    audit(plan, ranks_per_node=8)
    done = time.perf_counter()
    Path(path).write_text(dumps(plan))
    return {
        "schedule": declared - start,
        "plan": planned - declared,
        "audit": done - planned,
        "MiB": (_peak() - before) / MIB,
        "tensors": len(plan.tree),
        "kinds": len(list(audit(plan).shares)),
    }


def audit_saved(path: str) -> dict[str, float]:
    """Load and audit a saved plan in this process, which has no torch."""
    start = time.perf_counter()
    plan = loads(Path(path).read_text())
    loaded = time.perf_counter()
    audit(plan, ranks_per_node=8)
    assert "torch" not in sys.modules, "an audit needs no torch"
    return {"load": loaded - start, "audit saved": time.perf_counter() - loaded}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, timeout=600, check=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every case."""
    names = ("tensors", "kinds", "schedule", "plan", "audit", "MiB", "load", "audit saved")
    print("| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            path = f"{folder}/{number}.json"
            samples = [{**_measure("plan", str(number), path), **_measure("audit", path)} for _ in range(NUM_REPETITIONS)]
            found = {name: statistics.median(sample[name] for sample in samples) for name in names}
            whole = ("tensors", "kinds", "MiB")
            cells = [f"{found[name]:.0f}" if name in whole else f"{found[name]:.2f}" for name in names]
            print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["plan", number, path]:
            print(json.dumps(plan_and_audit(int(number), path)))
        case ["audit", path]:
            print(json.dumps(audit_saved(path)))
        case _:
            main()
