"""Programs give the same bits for every way of cutting, and do what the operations on whole tensors do."""

from __future__ import annotations

import textwrap
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional.init import evaluate as module
from shardplan.functional.init.evaluate import CHUNK_ELEMENTS, Job, evaluate
from shardplan.specs import InitProgram, Mesh, Operation, Shard
from shardplan.specs.index import index_shape
from shardplan.specs.program import (
    Bernoulli,
    Cauchy,
    Constant,
    Exponential,
    Fill,
    Geometric,
    LogNormal,
    Map,
    Node,
    Normal,
    Set,
    TruncatedNormal,
    Uniform,
)
from tests.helpers.init_programs import make, same, whole
from tests.helpers.processes import run_python
from tests.helpers.strategies import law
from tests.helpers.tensor_parts import one_interval, picked

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DRAWS = [
    Normal(0, 1),
    Normal(2, 0.5),
    Uniform(-1, 1),
    Uniform(0, 3),
    TruncatedNormal(0, 1, -2, 2),
    TruncatedNormal(0, 1, 2, 3),
    Exponential(2),
    LogNormal(0, 1),
    Bernoulli(0.5),
    Cauchy(0, 1),
    Geometric(0.3),
]
MAPS = [
    Map("mul_.Tensor", (0.3,)),
    Map("add_.Tensor", (1.7,)),
    Map("add_.Tensor", (2,), {"alpha": 0.5}),
    Map("pow_.Scalar", (3,)),
    Map("pow_.Scalar", (0.37,)),
    Map("sigmoid_"),
    Map("tanh_"),
    Map("exp_"),
    Map("log_"),
    Map("erfinv_"),
    Map("clamp_", (-0.5, 0.7)),
    Map("div_.Tensor", (3,)),
    Map("sqrt_"),
    Map("sin_"),
]


def ramp(shape, start=0.1):
    """A constant that differs in every element: its own flat index, and a little."""
    num = torch.Size(shape).numel()
    nodes = [
        Node("arange", (num,), {"dtype": {"dtype": "float32"}}),
        Node("add.Tensor", ({"node": 0}, start)),
        Node("reshape", ({"node": 1}, list(shape))),
    ]
    return Constant(shape, "float32", nodes)


sizes = st.one_of(st.integers(0, 9), st.sampled_from([1, 31, 33]))


@st.composite
def shapes(draw, min_axes=0):
    shape = draw(st.lists(sizes, min_size=min_axes, max_size=5))
    while torch.Size(shape).numel() > 5000:
        shape.pop()
    return tuple(shape)


@st.composite
def boxes(draw, shape):
    """Some part of a tensor, with steps; None for all of an axis."""
    box = []
    for size in shape:
        if not size or draw(st.booleans()):
            box.append(None)
            continue
        start = draw(st.integers(0, size - 1))
        count, step = draw(st.integers(1, size - start)), draw(st.integers(1, 3))
        box.append((start, start + (count - 1) // step * step + 1, step))
    return tuple(box) if any(box) else None


def shape_of(shape, box):
    return tuple(n if i is None else len(range(*i)) for n, i in zip(shape, box or [None] * len(shape), strict=True))


@st.composite
def programs(draw, shape):
    first = draw(st.sampled_from(DRAWS) | st.builds(Fill, st.floats(-2, 2)))
    operations = [Operation(first)]
    for _ in range(draw(st.integers(0, 4))):
        box = draw(st.none() | boxes(shape))
        part = shape_of(shape, box)
        constant = draw(st.sampled_from([ramp(part), ramp(())]))
        what = draw(
            st.sampled_from([*DRAWS, *MAPS, Fill(0), Fill(-1.5)])
            | st.sampled_from([Set(constant), Map("mul_.Tensor", ({"node": 0},), {}, [constant])])
        )
        operations.append(Operation(what, box))
    return InitProgram(operations)


@st.composite
def cuts(draw, shape):
    """Parts, each with the intervals of every axis: even for 1 to 8 ranks, anywhere, or some of each of three blocks."""
    of_axes = []
    for size in shape:
        marks = {0, size}
        match draw(st.sampled_from(["whole", "even", "uneven", "fused"])):
            case "even":
                num = draw(st.sampled_from([2, 3, 4, 8]))
                marks |= {min(size, rank * -(-size // num)) for rank in range(num)}
            case "uneven":
                marks |= set(draw(st.lists(st.integers(0, size), max_size=4)))
            case "fused" if size:
                num = draw(st.sampled_from([2, 4]))
                blocks = draw(st.lists(st.integers(1, size), min_size=1, max_size=3))
                shard = Shard(0, blocks=[*blocks, size], uneven=True, allow_empty=True)
                whole = [shard.intervals(sum(blocks) + size, Mesh(tensor=num).coordinate(rank)) for rank in range(num)]
                inside = [[(a, min(b, size)) for a, b in intervals if a < size] for intervals in whole]
                of_axes.append([tuple(intervals) for intervals in inside])
                continue
            case _:
                pass
        of_axes.append([(interval,) for interval in pairwise(sorted(marks))] or [()])
    return list(product(*of_axes))[:300]


def cut(tensor, index):
    return tensor[picked(index)]


@law
@given(st.data(), shapes(), st.sampled_from(FLOATS))
def test_parts_are_the_parts_of_the_whole(data, shape, dtype):
    program = data.draw(programs(shape))
    all_of_it = make(program, shape, dtype)
    assert not shape or all_of_it.shape == shape
    for index in data.draw(cuts(shape)):
        part = make(program, shape, dtype, index=index)
        assert same(part, cut(all_of_it, index)), index


@law
@given(st.data(), shapes(min_axes=1), st.sampled_from(FLOATS))
def test_all_at_once_is_one_by_one(data, shape, dtype):
    """However many tensors and parts are asked for together, each gets what it gets alone."""
    chosen = [data.draw(programs(shape)) for _ in range(2)]
    jobs = [
        Job(torch.full(index_shape(index), 9, dtype=dtype), data.draw(st.sampled_from(chosen)), path, shape, index)
        for path in ("a", "b", "c.d")
        for index in data.draw(cuts(shape))[:6]
    ]
    evaluate(jobs, 3)
    for job in jobs:
        alone = make(job.program, shape, dtype, path=job.path, seed=3, index=job.index)
        assert same(job.out, alone)


def test_programs_that_compare_equal_by_value_alone_are_not_mixed_up():
    plain = [InitProgram([Operation(Fill(value))]) for value in (0.0, -0.0)]
    outs = [torch.full((4,), 9.0) for _ in range(2)]
    evaluate((Job(out, p, "w", (4,), (((0, 4),),)) for out, p in zip(outs, plain, strict=True)), 0)
    assert [out.signbit().all().item() for out in outs] == [False, True]


@law
@given(st.data(), shapes(), st.sampled_from([64, 128, 640, 4096]), st.sampled_from(FLOATS))
def test_the_size_of_chunks_does_not_matter(data, shape, size, dtype):
    program = data.draw(programs(shape))
    expected = make(program, shape, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", {"cpu": size, "cuda": size})
        assert same(make(program, shape, dtype), expected)


def chain(num, shape=None):
    part = None if shape is None else ((1, shape[0], 2), *[None] * (len(shape) - 1))
    what = [MAPS[at] for at in (0, 1, 5, 4, 7, 13)]
    return InitProgram([Operation(DRAWS[num]), *(Operation(map_, part) for map_ in what)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num", range(len(DRAWS)), ids=[str(d) for d in DRAWS])
def test_threads_and_chunks_do_not_change_a_bit(num, dtype):
    shape = (7, 331, 67)  # five chunks, none of them whole
    program = chain(num, shape)
    before, made = torch.get_num_threads(), []
    try:
        for threads, size in [(1, CHUNK_ELEMENTS["cpu"]), (2, CHUNK_ELEMENTS["cpu"]), (3, 64 * 101), (1, 64 * 2000)]:
            torch.set_num_threads(threads)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "CHUNK_ELEMENTS", {"cpu": size, "cuda": size})
                made.append(make(program, shape, dtype))
    finally:
        torch.set_num_threads(before)
    assert all(same(one, made[0]) for one in made[1:])
    part = make(program, shape, dtype, index=one_interval((2, 6), (1, 330), (3, 66)))
    assert same(part, made[0][2:6, 1:330, 3:66])


@pytest.mark.parametrize("function", MAPS, ids=str)
def test_odd_lengths_are_rounded_as_even_ones(function):
    """torch rounds what is left after the last whole register in another way; a chunk has nothing left."""
    program = InitProgram([Operation(Uniform(0, 1)), Operation(function)])
    long = make(program, (1000,))
    for length in (1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 127):
        assert same(make(program, (1000,), index=one_interval((1000 - length, 1000))), long[-length:])
        assert same(make(program, (length,)), long[:length])


def test_one_path_has_one_key_and_others_have_others():
    x = make(Normal(0, 1), (64,), path="a")
    assert torch.equal(x, make(Normal(0, 1), (64,), path="a"))
    assert not (x == make(Normal(0, 1), (64,), path="b")).any()
    assert not (x == make(Normal(0, 1), (64,), path="a", seed=1)).any()
    assert torch.equal(x.view(8, 8), make(Normal(0, 1), (8, 8), path="a"))


def test_the_draws_of_a_program_are_counted_whether_they_hit_or_not():
    outside = Operation(Normal(0, 1), ((0, 1, 1),))
    first = make(InitProgram([Operation(Fill(0)), outside, Operation(Normal(0, 1), ((5, 8, 1),))]), (8,))
    again = make(
        InitProgram([Operation(Fill(0)), outside, Operation(Normal(0, 1), ((5, 8, 1),))]), (8,), index=one_interval((4, 8))
    )
    assert torch.equal(first[4:], again)
    assert torch.equal(first[5:], make([Normal(0, 1), Normal(0, 1)], (8,))[5:])


@law
@given(st.data(), shapes(), st.sampled_from([torch.float32, torch.float64]))
def test_a_program_is_its_operations_on_a_whole_tensor(data, shape, dtype):
    """Without random numbers: what torch gives when it runs the same operators on the tensor itself."""
    expected = torch.full(shape, 1.5, dtype=dtype)
    operations = [Operation(Fill(1.5))]
    for _ in range(data.draw(st.integers(0, 4))):
        box = data.draw(st.none() | boxes(shape))
        part = shape_of(shape, box)
        values = (torch.arange(torch.Size(part).numel(), dtype=torch.float32) + 0.1).reshape(part)
        target = expected[tuple(slice(None) if i is None else slice(*i) for i in box or ())] if box else expected
        match data.draw(st.sampled_from(["fill", "set", "mul", "add", "clamp"])):
            case "fill":
                target.fill_(0.3)
                operations.append(Operation(Fill(0.3), box))
            case "set":
                target.copy_(values)
                operations.append(Operation(Set(ramp(part)), box))
            case "mul":
                target.mul_(values)
                operations.append(Operation(Map("mul_.Tensor", ({"node": 0},), {}, [ramp(part)]), box))
            case "add":
                target.add_(values, alpha=0.5)
                operations.append(Operation(Map("add_.Tensor", ({"node": 0},), {"alpha": 0.5}, [ramp(part)]), box))
            case _:
                target.clamp_(0.2, 1.1)
                operations.append(Operation(Map("clamp_", (0.2, 1.1)), box))
    for index in data.draw(cuts(shape)):
        part = make(InitProgram(operations), shape, dtype, index=index)
        torch.testing.assert_close(part, cut(expected, index), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int64, 2**53 + 1),
        (torch.int64, -(2**63)),
        (torch.int32, -7),
        (torch.int8, 127),
        (torch.uint8, 255),
        (torch.bool, True),
        (torch.bool, False),
        (torch.float16, 65504.0),
        (torch.float64, 0.1),
        (torch.float32, float("inf")),
        (torch.bfloat16, float("nan")),
        (torch.float32, -0.0),
    ],
)
def test_fills_are_exact(dtype, value):
    part = make(Fill(value), (5, 7), dtype, index=one_interval((1, 4), (0, 7)))
    assert same(part, torch.full((3, 7), value, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_constants_of_any_dtype_are_cut(dtype):
    table = torch.arange(35).reshape(5, 7).remainder(11).sub(3).to(dtype)
    name = str(dtype).removeprefix("torch.")
    node = Node("clone", ({"tensor": table.reshape(-1).tolist(), "shape": [5, 7], "dtype": name},))
    program = InitProgram([Operation(Set(Constant((5, 7), name, [node])))])
    assert same(make(program, (5, 7), dtype), table)
    assert same(make(program, (5, 7), dtype, index=one_interval((2, 5), (1, 3))), table[2:5, 1:3].contiguous())


def test_integers_are_computed_as_integers():
    program = InitProgram([Operation(Fill(2**60 + 1)), Operation(Map("add_.Tensor", (1,)), ((0, 3, 2),))])
    assert make(program, (4,), torch.int64).tolist() == [2**60 + 2, 2**60 + 1, 2**60 + 2, 2**60 + 1]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (1, 1, 1, 1, 1)])
def test_tensors_of_one_element_or_none(shape):
    x = make([Normal(0, 1), Map("mul_.Tensor", (2,))], shape)
    assert x.shape == shape
    if x.numel():
        assert torch.equal(x.reshape(()), make(Normal(0, 1), (9,))[0] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once_from_float32(dtype):
    for draw in DRAWS:
        assert same(make(draw, (999,), dtype), make(draw, (999,)).to(dtype)), draw


def test_what_a_part_is_does_not_depend_on_strides_of_the_run():
    """More axes than a table row has."""
    shape, index = (3, 2, 3, 2, 3, 4), one_interval((0, 2), (1, 2), (0, 2), (0, 1), (1, 3), (1, 3))
    program = [Normal(0, 1), Map("mul_.Tensor", ({"node": 0},), {}, [ramp(shape)])]
    assert same(make(program, shape, index=index), cut(make(program, shape), index).contiguous())


MEMORY = """
    import re
    import torch
    from pathlib import Path
    from shardplan.functional.init.evaluate import Job, evaluate
    from shardplan.specs import InitProgram, Operation
    from shardplan.specs.program import Map, Normal, TruncatedNormal
    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    torch.set_num_threads(2)
    def make(num):
        row = ((0, 1, 1), None)
        program = InitProgram([Operation(TruncatedNormal(0, 1, -2, 2)), Operation(Map("mul_.Tensor", (2,)), row)])
        shape = (num // 1024, 1024)
        out = torch.empty(shape)
        evaluate([Job(out, program, "w", shape, tuple(((0, size),) for size in shape))], 0)
        return out
    make(2**20)
    before = peak()
    out = make(2**26)
    print(peak() - before - out.nbytes, out.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell the peak of its memory")
def test_memory_beyond_the_tensor_is_small():
    beyond, held = map(int, run_python(textwrap.dedent(MEMORY)).split())
    assert held == 2**28
    assert beyond < 64 * 2**20


def test_jobs_write_nothing_but_their_own_part():
    bank = torch.full((100,), 9.0)
    shape = (40,)
    evaluate([Job(bank[10:50], InitProgram([Operation(Normal(0, 1))]), "w", shape, whole(shape))], 0)
    assert (bank[:10] == 9).all()
    assert (bank[50:] == 9).all()
    assert not (bank[10:50] == 9).any()
