"""Init programs on CUDA: the bits of the CPU, and values that no cut changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardplan.functional import create_schedule, execute, plan_build
from shardplan.functional.init.evaluate import Job, evaluate
from shardplan.functional.init.random_bits import draw_bits, draw_by_torch
from shardplan.specs import InitProgram, Mesh, Operation
from shardplan.specs.index import index_shape
from shardplan.specs.program import (
    Bernoulli,
    Cauchy,
    Exponential,
    Fill,
    Geometric,
    LogNormal,
    Map,
    Normal,
    TruncatedNormal,
    Uniform,
)
from tests.helpers.init_programs import make, number_reference, same, whole
from tests.helpers.tensor_parts import one_interval, picked

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")

KEY = 0x01234567, 0xF9ABCDEF
DRAWS = [
    Normal(2, 0.5),
    Uniform(-1, 1),
    Uniform(2, 5),
    TruncatedNormal(0, 1, -2, 2),
    TruncatedNormal(0, 1, 2, 3),
    Exponential(2),
    LogNormal(0, 1),
    Bernoulli(0.5),
    Cauchy(0, 1),
    Geometric(0.3),
]


def tables(*, double):
    boundary = (2 if double else 4) * 2**32
    for start in (0, 1, 2, 3, boundary - 7, 2**34 - 3, 2**40 + 1, 2**60 + 3):
        for length in (1, 2, 33, 5000):
            yield np.array([(*KEY, 0, start, length, 0, 1, 1, 1, 0, 0, 0)])
    rows, out = [], 0
    for length, num in [(3, 500), (1, 7), (257, 3), (4, 2)]:
        rows.append((KEY[1], out, out, 12345 * out, length, 2, num, 2, 3, length + 1, 2**20 + 1, 2**33 + 5))
        out += length * num
    yield np.array(rows)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("function", [draw_bits, draw_by_torch])
def test_bits_are_those_of_the_cpu(function, unit, double):
    for table in tables(double=double):
        size = int((table[:, 4] * table[:, 6]).sum())
        on_cpu = torch.empty(size, dtype=torch.float64 if double else torch.float32)
        on_cuda = torch.full((size + 64,), 9.0, dtype=on_cpu.dtype, device="cuda")
        draw_bits(on_cpu, table, 2**31 + 3, unit=unit)
        function(on_cuda[:size], table, 2**31 + 3, unit=unit)
        assert torch.equal(on_cuda[:size].cpu(), on_cpu), table
        assert (on_cuda[size:] == 9).all()


def test_bits_are_those_of_the_reference():
    start = 4 * 2**32 - 10
    x = torch.empty(21, device="cuda")
    draw_bits(x, np.array([(*KEY, 0, start, 21, 0, 1, 1, 1, 0, 0, 0)]), 7, unit=False)
    assert x.tolist() == [number_reference(start + i, 7, KEY, double=False, unit=False) for i in range(21)]


def on_cuda(program, shape, index, dtype):
    out = torch.empty(index_shape(index), dtype=dtype, device="cuda")
    evaluate([Job(out, program, "w", shape, index)], 0)
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_values_are_close_to_those_of_the_cpu_and_no_cut_changes_them(draw, dtype):
    shape = (701, 333)
    row = ((3, 600, 2), None)
    maps = [
        Operation(Map("mul_.Tensor", (0.5,)), row),
        Operation(Map("sigmoid_"), row),
        Operation(Fill(0.25), ((7, 8, 1), None)),
    ]
    program = InitProgram([Operation(draw), *maps])
    one = on_cuda(program, shape, whole(shape), dtype)
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(one, make(program, shape, dtype), rtol=tolerance, atol=tolerance * 1e-2)
    for index in (
        one_interval((0, 350), (0, 333)),
        one_interval((350, 701), (0, 333)),
        one_interval((0, 701), (1, 100)),
        one_interval((5, 9), (100, 333)),
        one_interval((700, 701), (0, 1)),
        (((0, 100), (300, 401), (700, 701)), ((3, 30), (111, 333))),
    ):
        part = one[picked(index)].contiguous()
        assert same(on_cuda(program, shape, index, dtype), part), index


def test_many_tensors_at_once_are_one_by_one():
    program = InitProgram([Operation(Normal(0, 1))])
    outs = {f"layer.{number}": torch.empty(number * 7 + 1, 33, device="cuda") for number in range(40)}
    evaluate([Job(out, program, path, tuple(out.shape), whole(out.shape)) for path, out in outs.items()], 3)
    for path, out in outs.items():
        alone = torch.empty_like(out)
        evaluate([Job(alone, program, path, tuple(out.shape), whole(out.shape))], 3)
        assert torch.equal(out, alone), path


def test_memory_beyond_the_tensor_is_small():
    program = InitProgram([Operation(TruncatedNormal(0, 1, -2, 2)), Operation(Map("mul_.Tensor", (2,)), ((0, 1, 1), None))])
    out = torch.empty(2**16, 2**10, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    evaluate([Job(out, program, "w", tuple(out.shape), whole(out.shape))], 0)
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20


def test_a_module_planned_on_the_cpu_is_close_on_both_devices():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Embedding(100, 64, 1), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    plan = plan_build(create_schedule(model, Mesh()))
    one, other = execute(plan, device="cpu").module, execute(plan, device="cuda").module
    for (path, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6, msg=path)
