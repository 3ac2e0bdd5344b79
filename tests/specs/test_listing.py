"""What ``print(plan)`` shows: every tensor once, repeated layers folded, in a form kept as goldens."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.functional import assert_plan_matches, plan_build
from shardplan.specs import (
    Constant,
    InitProgram,
    Made,
    Mesh,
    ModuleCall,
    ModuleValues,
    Node,
    Operation,
    ParamSpec,
    Plan,
    Shard,
    SpecTree,
    TensorCall,
)
from shardplan.specs.fold_layers import fold
from shardplan.specs.layout_steps import (
    AddBiasAfterSync,
    DispatchTokens,
    ForkRng,
    MaskPadding,
    SetAttributes,
    SetToLocalSize,
    SumGradient,
    Sync,
    VocabParallel,
)
from shardplan.specs.program import (
    Bernoulli,
    Cauchy,
    Exponential,
    Fill,
    Geometric,
    LogNormal,
    Map,
    Normal,
    Set,
    TruncatedNormal,
    Uniform,
)
from tests.helpers.models import llama, split_llama
from tests.helpers.strategies import law, paths, plans, programs, words

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

cells = st.tuples(st.sampled_from(["f32[4]", "f32[8]"]))


def unfold(rows):
    """Write a row for every number in the ranges."""
    for path, rest in rows:
        spans = [range(int(first), int(last) + 1) for first, last in RANGE.findall(path)]
        template = RANGE.sub("{}", path)
        yield from ((template.format(*numbers), rest) for numbers in product(*spans))


@law
@given(st.lists(st.tuples(paths, cells), max_size=6, unique_by=lambda row: row[0]))
def test_folding_keeps_every_row(rows):
    assert sorted(unfold(fold(rows))) == sorted(rows)


@law
@given(st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 2)), cells, max_size=15))
def test_folding_keeps_every_row_of_nested_layers(layers):
    rows = [(f"layers.{i}.experts.{j}.weight", rest) for (i, j), rest in layers.items()]
    assert sorted(unfold(fold(rows))) == sorted(rows)


@law
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_equal_layers_fold_into_one_row(num_layers, num_experts, start):
    rows = [(f"layers.{i + start}.experts.{j}", ("f32[4]",)) for i in range(num_layers) for j in range(num_experts)]
    assert len(fold(rows)) == 1


@pytest.mark.parametrize(
    ("numbers", "folded"),
    [
        ([0, 1, 2], ["layers.{0..2}.w"]),
        ([2, 0, 1], ["layers.{0..2}.w"]),
        ([0, 1, 3, 4, 6], ["layers.{0..1}.w", "layers.{3..4}.w", "layers.6.w"]),
        ([9, 10, 11], ["layers.{9..11}.w"]),
        ([7], ["layers.7.w"]),
    ],
)
def test_runs_of_numbers_become_ranges(numbers, folded):
    assert [path for path, _ in fold([(f"layers.{i}.w", ()) for i in numbers])] == folded


def test_layers_that_differ_stay_apart():
    rows = [(f"layers.{i}.w", ("f32[8]" if i == 2 else "f32[4]",)) for i in range(5)]
    assert fold(rows) == [
        ("layers.{0..1}.w", ("f32[4]",)),
        ("layers.{3..4}.w", ("f32[4]",)),
        ("layers.2.w", ("f32[8]",)),
    ]


@pytest.mark.parametrize("path", ["layer2.weight", "a{b}.0.weight", "blocks.007.weight", "{0..1}.weight", ""])
def test_one_row_is_shown_as_it_is(path):
    assert fold([(path, ())]) == [(path, ())]


@law
@given(plans())
def test_the_first_lines_name_the_plan_and_its_mesh(plan):
    first, second = str(plan).splitlines()[:2]
    assert first == f"plan {plan.fingerprint[:12]}  target={plan.target or 'none'} seed={plan.seed}"
    assert second == str(plan.mesh)


@law
@given(st.lists(words, min_size=1, max_size=5, unique=True))
def test_every_tensor_is_shown_with_its_type(names):
    tree = SpecTree(ParamSpec(name, (4, size), "float32", shards=(Shard(0),)) for size, name in enumerate(names))
    lines = str(Plan(Mesh(tensor=2), tree, steps=())).splitlines()[2:]
    assert [re.split(r"  +", line)[:3] for line in lines] == [["stage 0", spec.path, spec.type] for spec in tree.values()]


ROTARY = Constant(
    (4,),
    "float32",
    [
        Node("arange.start_step", (0, 8, 2)),
        Node("_to_copy", ({"node": 0},), {"dtype": {"dtype": "float32"}}),
        Node("div.Tensor", ({"node": 1}, 8)),
        Node("pow.Scalar", (10000.0, {"node": 2})),
        Node("reciprocal", ({"node": 3},)),
    ],
)
COPIED = Constant((4,), "float32", [Node("lift_fresh", ({"tensor": [1, 2], "shape": [2], "dtype": "float32"},))])


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        (Normal(0, 0.02), "normal(0, 0.02)"),
        (Normal(-1.5, 1), "normal(-1.5, 1)"),
        (Uniform(-0.02209708691207961, 0.02209708691207961), "uniform(±0.0221)"),
        (Uniform(0.5, 1.5), "uniform(0.5, 1.5)"),
        (TruncatedNormal(0, 0.02, -0.04, 0.04), "truncated_normal(0, 0.02, ±0.04)"),
        (TruncatedNormal(0, 1, 3, 4), "truncated_normal(0, 1, 3, 4)"),
        (Exponential(2), "exponential(2)"),
        (LogNormal(0, 0.25), "log_normal(0, 0.25)"),
        (Bernoulli(0.5), "bernoulli(0.5)"),
        (Cauchy(0, 1), "cauchy(0, 1)"),
        (Geometric(0.125), "geometric(0.125)"),
        (Fill(0), "zero"),
        (Fill(0.0), "zero"),
        (Fill(1.0), "fill(1)"),
        (Fill(True), "fill(True)"),
        (Fill(False), "fill(False)"),
        (Fill(float("-inf")), "fill(-inf)"),
        (Fill(float("nan")), "fill(nan)"),
        (Map("mul_.Tensor", (2,)), "mul(2)"),
        (Map("clamp_", (), {"min": -2, "max": {"float": "inf"}}), "clamp(min=-2, max=inf)"),
        (Map("clamp_", (None, 0.5)), "clamp(None, 0.5)"),
        (Map("exp_"), "exp()"),
        (Map("add_.Tensor", ({"node": 0},), {"alpha": 3}, [COPIED]), "add([numbers], alpha=3)"),
        (Set(ROTARY), "constant(arange, div, pow, reciprocal)"),
        (
            Set(Constant((4,), "float32", [*ROTARY.nodes, *(Node(name, ({"node": 4},)) for name in ("neg", "cos", "exp"))])),
            "constant(arange, div, pow, reciprocal, neg, cos, ...)",
        ),
        (Set(COPIED), "constant(numbers)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_operation_is_shown_in_a_few_words(what, shown):
    assert str(Operation(what)) == shown
    assert f"  {shown}  " in str(
        Plan(Mesh(), SpecTree([ParamSpec("w", (), "float32", source=InitProgram([Operation(what)]))]), ())
    )


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        (((0, 1, 1), None), "zero row 0"),
        (((2, 5, 1), None, None), "zero rows 2:5"),
        (((0, 1, 1),), "zero [0]"),
        (((0, 4, 2), None), "zero [0:4:2, :]"),
        ((None, (3, 4, 1)), "zero [:, 3]"),
        ((None, (0, 8, 1)), "zero [:, 0:8]"),
        (((0, 1, 1), (1, 3, 1)), "zero [0, 1:3]"),
    ],
)
def test_the_part_that_an_operation_is_about_is_shown(box, shown):
    assert str(Operation(Fill(0), box)) == shown


@law
@given(programs)
def test_a_program_is_shown_as_its_operations_in_order(program):
    assert str(program) == "; ".join(map(str, program.operations))
    shown = str(Plan(Mesh(), SpecTree([ParamSpec("w", (4,), "float32", source=program)]), ()))
    assert f"  {program}  16 B/rank" in shown


def test_what_has_no_program_is_shown_by_its_code():
    calls = (
        ModuleCall("", "init_weights", "train:Model.init"),
        TensorCall("w", "train:fill"),
        TensorCall("w", "train:fill"),
    )
    assert str(Made(calls, "its code looks at values that are drawn")) == "Model.init; fill"


def test_golden_of_a_llama():
    assert_plan_matches(plan_build(split_llama(llama(), Mesh(data=2, tensor=2))), "../golden/llama.txt")


def test_golden_of_all_that_can_be_noted():
    head = ParamSpec("embed.weight", (64, 16), "bfloat16", shards=(Shard(0),), tie=("head.weight",), source=ModuleValues())
    gain = ParamSpec("gain", (16,), "float32", requires_grad=False, source=InitProgram([Operation(Fill(1.0))]))
    fill = Made((TensorCall("mask", "train:causal"), TensorCall("mask", "train:fill"), TensorCall("mask", "train:fill")))
    program = InitProgram([Operation(Normal(0, 0.02)), Operation(Fill(0), ((0, 1, 1), None))])
    words = ParamSpec("words.weight", (64, 16), "bfloat16", source=program)
    mask = ParamSpec("mask", (8, 8), "bool", kind="buffer", tags={"why": "causal", "rows": [1, 2]}, source=fill)
    table = ParamSpec("table", (), "int64", kind="non_persistent_buffer", stage=1)
    layout = [
        SetAttributes("embed", {"num_embeddings": 32}),
        VocabParallel("embed", 32),
        Sync("", "forward_post", "all_gather", axis=-1),
        *(Sync(f"layers.{i}", "forward_pre", "train:join", mesh_axis="data") for i in range(3)),
        AddBiasAfterSync("head"),
        Sync("head", "backward_pre", "all_reduce", which=1, features=(4, 8)),
        Sync("head", "forward_post", "all_gather", axis=-1, sizes=(33, 65)),
        SetToLocalSize("head", "out_features", "weight", 0),
        MaskPadding("head", (33, 65)),
        *(ForkRng(f"layers.{i}.dropout") for i in range(3)),
        *(SumGradient(f"layers.{i}.norm", "weight") for i in range(3)),
        *(DispatchTokens(f"layers.{i}.experts", 4) for i in range(3)),
        *(SumGradient(f"layers.{i}.experts", "up", "expert_data", divide=4) for i in range(3)),
        SumGradient("qkv", "weight", axis=0, sharing=((4, 1), (2, 2))),
    ]
    repeated = Shard(0, blocks=(8, 4, 4), granule=4, replicate=True)
    split = [
        ParamSpec("qkv.weight", (16, 8), "float32", shards=(repeated,)),
        ParamSpec("neox.weight", (48, 8), "float32", shards=(Shard(0, interleaved=4),)),
        ParamSpec("chunked.weight", (5, 8), "float32", shards=(Shard(0, uneven=True), Shard(1, "data"))),
        ParamSpec("padded.weight", (63, 8), "float32", shards=(Shard(0, pad_to_multiple=4),)),
        ParamSpec("experts.up", (4, 24, 8), "float32", shards=(Shard(0, "expert"), Shard(1, blocks=(12, 12)))),
    ]
    tree = SpecTree([head, words, gain, mask, table, *split])
    assert_plan_matches(
        Plan(Mesh(pipe=2, data=2, tensor=2, expert=2), tree, layout, target="deepspeed", seed=7), "../golden/notes.txt"
    )
