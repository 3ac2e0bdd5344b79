"""The peak that the audit predicts is the memory that a process takes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from shardplan.functional import create_schedule, execute, plan_build, predict
from shardplan.specs import InitProgram, Mesh, dumps, loads
from tests.helpers.ranks import results, run_ranks

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


def warm_up(dtype):
    """Compile the kernels, which takes memory once, if no process has done it yet."""
    execute(plan_build(create_schedule(Drawn(64, 64, bias=False, device="meta", dtype=dtype), MESH)), device="cpu")


def measure(rank, strategy, axis):
    plan = plan_build(create_schedule(wide(), MESH).at["**.weight"].shard(axis=axis).at[""].sync(*GATHER), strategy=strategy)
    warm_up(torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    built = execute(plan, device="cpu")
    peak = resident("VmHWM") - before
    for _ in range(300):  # gloo's thread gives back what it has sent a moment later
        if resident("VmRSS") - before <= 1.05 * built.receipt.held_bytes:
            break
        time.sleep(0.1)
    return peak, resident("VmRSS") - before, built.receipt, predict(plan, rank)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell a process its own peak")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strategy", ["scatter", "broadcast"])
def test_the_predicted_peak_is_what_the_process_takes(strategy, axis):
    for peak, held, receipt, predicted in results(run_ranks(measure, 2, strategy, axis)):
        assert receipt == predicted
        assert held == pytest.approx(receipt.held_bytes, rel=0.05)
        assert peak == pytest.approx(receipt.peak_bytes, rel=0.05)


class Drawn(nn.Linear):
    """Normal draws, one row of zeros, and a scale: all the memory that evaluating a program takes."""

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.normal_(0, 0.02)
            self.weight.mul_(2)
            self.weight[0].zero_()


class Cut(nn.Linear):
    """Truncated normal draws, whose inverse takes memory of its own."""

    def reset_parameters(self):
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)


class Table(nn.Linear):
    """A constant as large as the tensor, which each rank computes whole."""

    def reset_parameters(self):
        steps = torch.arange(float(self.weight.numel()))
        with torch.no_grad():
            self.weight.copy_(steps.sin().view_as(self.weight))


def three(kind, rows, dtype):
    return nn.Sequential(*(kind(4096, rows, bias=False, device="meta", dtype=dtype) for _ in range(3)))


def born_in_parts(rank, text, kind, rows, dtype):
    """The plan comes as text: planning here would leave memory behind, to be used again."""
    plan = loads(text)
    warm_up(dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    built = execute(plan, three(kind, rows, dtype), device="cpu")
    return resident("VmHWM") - before, built.receipt, predict(plan, rank)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell a process its own peak")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("kind", "rows", "dtype"),
    [
        (Wide, 8192, torch.float32),
        (Drawn, 8192, torch.bfloat16),
        (Cut, 8192, torch.float32),
        (Table, 512, torch.float32),
    ],
)
def test_a_rank_that_evaluates_its_own_parts_needs_64_mib_beyond_them_at_most(kind, rows, dtype, axis):
    sch = create_schedule(three(kind, rows, dtype), MESH).at["**.weight"].shard(axis=axis).at[""].sync(*GATHER)
    plan = plan_build(sch, strategy="local")
    assert all(isinstance(spec.source, InitProgram) for spec in plan.tree.values())
    for peak, receipt, predicted in results(run_ranks(born_in_parts, 2, dumps(plan), kind, rows, dtype)):
        assert receipt == predicted
        assert receipt.held_bytes == 3 * 4096 * rows * dtype.itemsize // 2
        assert receipt.held_bytes - 2 * MIB <= peak <= receipt.held_bytes + 64 * MIB
