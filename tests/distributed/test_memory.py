"""The peak that the audit predicts is the memory that a process takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build, predict
from shardplan.specs import Mesh
from tests.ranks import results, run_ranks

MIB = 2**20
MESH = Mesh(tensor=2)
GATHER = ("forward_post", "all_gather", -1)


class Wide(nn.Linear):
    """Init code that takes no memory of its own."""

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.fill_(0.5)


def wide():
    return nn.Sequential(*(Wide(4096, 8192, bias=False, device="meta") for _ in range(3)))  # 128 MiB each


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(rank, strategy, axis):
    plan = plan_build(create_schedule(wide(), MESH).at["**.weight"].shard(axis=axis).at[""].sync(*GATHER), strategy=strategy)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    built = execute(plan, device="cpu")
    return resident("VmHWM") - before, resident("VmRSS") - before, built.receipt, predict(plan, rank)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell a process its own peak")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strategy", ["scatter", "broadcast"])
def test_the_predicted_peak_is_what_the_process_takes(strategy, axis):
    for peak, held, receipt, predicted in results(run_ranks(measure, 2, strategy, axis)):
        assert receipt == predicted
        assert held == pytest.approx(receipt.held_bytes, abs=24 * MIB)
        assert peak == pytest.approx(receipt.peak_bytes, abs=24 * MIB)
