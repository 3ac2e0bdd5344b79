"""A plan survives JSON, and what is damaged, foreign or nameless is refused."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import get_args

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from shardplan.specs import (
    Activation,
    Call,
    Constant,
    ExampleInput,
    InitProgram,
    Made,
    Mesh,
    ModuleCall,
    ModuleValues,
    Node,
    Operation,
    Origin,
    OwnValues,
    ParamSpec,
    Pipeline,
    PlainInput,
    Plan,
    PlanError,
    Runtime,
    Shard,
    Source,
    SpecTree,
    Stage,
    Step,
    TensorCall,
    TensorInput,
    Uninitialised,
    VariableSize,
    dumps,
    loads,
)
from shardplan.specs.layout_steps import (
    AddBiasAfterSync,
    DispatchTokens,
    ForkRng,
    MaskPadding,
    SetAttributes,
    SetToLocalSize,
    ShareRng,
    SumGradient,
    SumProducts,
    Sync,
    VocabParallel,
)
from shardplan.specs.plan import SCHEMA_VERSION
from shardplan.specs.program import (
    RANDOM_SCHEME,
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
    What,
)
from shardplan.specs.source import Loaded, Materialised, Unknown
from shardplan.specs.steps import (
    Agree,
    Allocate,
    AsDTensors,
    Broadcast,
    CheckLoaded,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    LoadOwn,
    LoadShard,
    MakeGroups,
    MakeOptimizer,
    MakeTieGroups,
    Place,
    Scatter,
    SendCopy,
    Slice,
    SumTied,
    TakeShard,
    TakeStages,
    TakeWhole,
    Tie,
    Wrap,
)
from shardplan.specs.stored import Folder, Part, StoredFile, StoredTensor
from tests.helpers.processes import run_python
from tests.helpers.strategies import constants, folder_of, json_values, law, param_specs, plans, programs, words

NAMES = ("calm", "dark", "early", "fast", "green", "heavy")
CALLS = (
    ModuleCall("up", "_init_weights", "shapes.layers:Up._init_weights", owner="up"),
    TensorCall("up.weight", "train:fill"),
)
NODES = (
    Node("arange.start_step", (0, 4, 1), {"dtype": {"dtype": "int64"}, "pin_memory": None}),
    Node("full", ([4], {"float": "-inf"})),
    Node("_to_copy", ({"tensor": [1, {"float": "nan"}], "shape": [2], "dtype": "float64"},)),
    Node("unbind.int", ({"node": 0},)),
    Node("clone", ({"node": 3, "item": 1},), {"memory_format": {"memory_format": "contiguous_format"}}),
)
CONSTANT = Constant((2,), "float32", NODES, values=[0.5, {"float": "inf"}])
PROGRAM = InitProgram(
    [
        Operation(Normal(0, 0.02)),
        Operation(TruncatedNormal(0, 1, -2, 2), (None, (0, 4, 2))),
        *map(Operation, (Uniform(-1, 1), Exponential(2), LogNormal(0, 1), Bernoulli(0.5), Cauchy(0, 1), Geometric(0.5))),
        Operation(Map("mul_.Tensor", ({"node": 0},), {"alpha": 2}, [CONSTANT])),
        Operation(Set(CONSTANT)),
        Operation(Fill(float("-inf")), ((0, 1, 1), None)),
    ],
    replaces=True,
)
STORED = StoredTensor("model.safetensors", "experts.1.w3", 4096, (8, 4), "float16", sum=2**64 - 1)
SOURCES = (
    PROGRAM,
    Made(CALLS, "its code looks at values"),
    Loaded((Part(STORED, ((0, 8), (0, 2)), at=(1, 8, 0), axes=(-1, 0, 1)),)),
    Materialised("0" * 64),
    *(ModuleValues(), OwnValues(), Uninitialised(), Unknown()),
)
FOLDER = Folder("llama", (StoredFile("model.safetensors", 9000, "f" * 64),))
STEPS = (
    Agree("opening"),
    MakeGroups((("data",), ("data", "tensor")), (("tensor", 2),)),
    MakeTieGroups(((0, 1), (1, 0))),
    Generate(0, ("up.weight",), CALLS, scratch=("s.1",), key="s.0"),
    TakeWhole(0, ("s.1",)),
    TakeShard(0, ("s.2",)),
    LoadShard(0, ("s.2",), "float16", ("data",)),
    LoadOwn(0, ("s.3",)),
    CheckLoaded(),
    Allocate(0, ("s.3",)),
    EvaluateWhole(0, ("s.0",)),
    EvaluateShard(0, ("s.0",)),
    Scatter(0, ("up.weight",), ("tensor",)),
    Broadcast(0, ("up.weight",), ("data",)),
    SendCopy(0, 1, ("up.weight",)),
    Slice(0, ("up.weight",)),
    Place(0, ("up.weight",)),
    Tie(0, "up.weight", ("head.weight",)),
    SetAttributes("up", {"out_features": 4, "names": ["a", {"b": None}]}),
    VocabParallel("up", 4),
    AddBiasAfterSync("up"),
    Sync("up", "forward_post", "all_gather", axis=-1),
    Sync("up", "backward_post", "train:join", mesh_axis="data"),
    Sync("up", "backward_pre", "all_reduce", which=1, features=(2, 4)),
    Sync("up", "forward_post", "all_gather", axis=1, sizes=(4, 7)),
    SetToLocalSize("up", "out_features", "weight", 0),
    SumGradient("up", "weight", axis=0, sharing=((4, 1), (2, 2))),
    SumGradient("up", "weight", "expert_data", divide=2),
    SumProducts("up", "weight", "gradients"),
    DispatchTokens("up", 4),
    ForkRng("up"),
    ShareRng("up", onwards=True),
    MaskPadding("up", (4, 7)),
    TakeStages(),
    SumTied("up.weight", (0, 1)),
    AsDTensors(("data", "tensor")),
    Agree("closing"),
    MakeOptimizer(),
    Wrap("deepspeed"),
)
EXAMPLE = (TensorInput("ids", (4, 12), "int64"), PlainInput("options", {"use_cache": False, "layers": [1, None]}))
IDS = Activation("ids", ("batch", "sequence"), "int64", 384)
HIDDEN = Activation("add_3", ("batch", "2*sequence + 1", 4), "bfloat16", 800, requires_grad=True)
PIPELINE = Pipeline(
    stages=(
        Stage(("up", "s"), (IDS,), (HIDDEN, IDS), "3f" * 32),
        Stage(("head",), (HIDDEN, IDS), (Activation("loss", (), "float32", 4, requires_grad=True),), "a0" * 32),
    ),
    cuts=("up",),
    chain=(("up", "s"), ("head",)),
    leaves=("s.gate",),
    example=EXAMPLE,
    sizes=(VariableSize("batch", 4), VariableSize("sequence", 12, least=2, most=64)),
)


def example():
    """A plan with a source of each kind and a step of each kind; its tags and its config come in the order of a set."""
    weight = ParamSpec(
        "up.weight",
        (8, 4),
        "bfloat16",
        shards=(Shard(0, granule=2), Shard(1, "expert", blocks=(2, 2))),
        also_on=(1,),
        tags=dict.fromkeys(set(NAMES), 1),
        tie=("head.weight",),
        source=SOURCES[0],
        origin=Origin("colwise", "up", "train.py:12"),
    )
    others = (ParamSpec(f"s.{i}", (), "float32", source=source) for i, source in enumerate(SOURCES))
    config = {"zero_optimization": {"stage": 1}, "betas": [0.9, 0.95], **dict.fromkeys(set(NAMES), 1)}
    return Plan(
        Mesh(2, 2, 2, 2),
        SpecTree([weight, *others]),
        STEPS,
        target="deepspeed",
        config=config,
        seed=7,
        pipeline=PIPELINE,
        folder=FOLDER,
    )


def with_source(source):
    return Plan(Mesh(), SpecTree([ParamSpec("w", (4,), "float32", source=source)]), ())


def done(what, box=None):
    return with_source(InitProgram([Operation(what, box)]))


def without_values(source):
    """Return a source whose constants have lost the values that were computed while planning."""

    def bare(operation):
        match operation.what:
            case Set(constant=constant):
                return evolve(operation, what=Set(evolve(constant, values=None)))
            case Map(constants=given):
                return evolve(operation, what=evolve(operation.what, constants=[evolve(one, values=None) for one in given]))
            case _:
                return operation

    return evolve(source, operations=map(bare, source.operations)) if isinstance(source, InitProgram) else source


@law
@given(plans())
def test_a_plan_survives_json(plan):
    again = loads(dumps(plan))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert hash(again) == hash(plan)
    assert dumps(again) == dumps(plan)


@law
@given(plans())
def test_origins_survive_json(plan):
    assert [spec.origin for spec in loads(dumps(plan)).tree.values()] == [spec.origin for spec in plan.tree.values()]


@law
@given(programs)
def test_values_of_constants_survive_json(program):
    (again,) = loads(dumps(with_source(program))).tree.specs
    assert again.source == program
    assert [one.values for one in again.source.constants] == [one.values for one in program.constants]


def test_every_kind_of_step_source_call_and_operation_survives_json():
    assert {type(operation.what) for operation in PROGRAM.operations} == set(get_args(What))
    assert {type(step) for step in STEPS} == set(get_args(Step))
    assert {type(source) for source in SOURCES} == set(get_args(Source))
    assert {type(call) for call in CALLS} == set(get_args(Call))
    assert {type(given) for given in EXAMPLE} == set(get_args(ExampleInput))
    again = loads(dumps(example()))
    assert again.steps == STEPS
    assert again.pipeline == PIPELINE
    assert again == example()


NOT_IN_JSON = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("value", NOT_IN_JSON)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Map("add_.Tensor", (value,)), "args"),
        (lambda value: Map("add_.Tensor", (1,), {"alpha": [value]}), "kwargs"),
        (lambda value: Node("full", ([4], value)), "args"),
        (lambda value: Node("full", (), {"fill_value": value}), "kwargs"),
        (lambda value: evolve(CONSTANT, values=[0, value]), "values"),
        (lambda value: evolve(example(), config={"clip": value}), "config"),
    ],
)
def test_numbers_that_json_has_not_are_refused_where_they_are_written(make, name, value):
    with pytest.raises(ValueError, match=f"{name}: a plan holds plain, finite JSON values, not"):
        make(value)


@pytest.mark.parametrize("value", NOT_IN_JSON)
def test_a_fill_spells_them_out(value):
    text = dumps(done(Fill(value)))
    json.loads(text, parse_constant=pytest.fail)
    (again,) = loads(text).tree.specs
    assert repr(again.source.operations[0].what.number) == repr(value)
    assert len({done(Fill(one)).fingerprint for one in (*NOT_IN_JSON, 1.0)}) == 4


@law
@given(plans(), plans())
def test_plans_are_equal_if_and_only_if_their_fingerprints_are(one, other):
    assert (one == other) == (one.fingerprint == other.fingerprint)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: done(Fill(value)),
        lambda value: done(Normal(value, 1)),
        lambda value: done(Map("clamp_", (value,), {"max": value})),
        lambda value: done(Set(evolve(CONSTANT, nodes=[Node("full", ([2], value))]))),
        lambda value: evolve(example(), config={"clip": value}),
    ],
)
@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0)])
def test_equal_numbers_of_different_types_keep_that_law(make, one, other):
    assert (make(one) == make(other)) == (make(one).fingerprint == make(other).fingerprint)


def first_stage(**change):
    """The example's stages, the first one changed."""
    return {"stages": (evolve(PIPELINE.stages[0], **change), PIPELINE.stages[1])}


CHANGES_OF_A_PIPELINE = [
    {"cuts": ("up", "s")},
    {"chain": ()},
    {"leaves": ()},
    {"example": EXAMPLE[::-1]},
    {"example": (evolve(EXAMPLE[0], name="tokens"), EXAMPLE[1])},
    {"example": (evolve(EXAMPLE[0], shape=(4, 13)), EXAMPLE[1])},
    {"example": (evolve(EXAMPLE[0], dtype="int32"), EXAMPLE[1])},
    {"example": (EXAMPLE[0], PlainInput("options", {"use_cache": True, "layers": [1, None]}))},
    *({"sizes": (evolve(PIPELINE.sizes[0], **one),)} for one in ({"name": "b"}, {"example": 5}, {"least": 1}, {"most": 9})),
    first_stage(modules=("up",)),
    first_stage(inputs=(IDS, IDS)),
    first_stage(outputs=(IDS, HIDDEN)),
    first_stage(digest="00" * 32),
    *(
        first_stage(inputs=(evolve(IDS, **one),))
        for one in (
            {"name": "x"},
            {"shape": ("batch", 12)},
            {"dtype": "int32"},
            {"num_bytes": 4},
            {"requires_grad": True},
        )
    ),
]


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": Mesh(2, 2, 4)},
        {"tree": example().tree.map(lambda spec: evolve(spec, dtype="float32"))},
        {"steps": STEPS[:-1]},
        {"steps": STEPS[::-1]},
        {"target": None},
        {"config": None},
        {"seed": 8},
        {"pipeline": None},
        {"folder": evolve(FOLDER, path="other")},
        {"folder": evolve(FOLDER, files=(evolve(FOLDER.files[0], digest="0" * 64),))},
        *({"pipeline": evolve(PIPELINE, **one)} for one in CHANGES_OF_A_PIPELINE),
        {"random_scheme": RANDOM_SCHEME + 1},
        {"tree": example().tree.map(lambda spec: evolve(spec, source=PROGRAM))},
    ],
)
def test_every_field_counts_in_equality_and_fingerprint(change):
    changed = evolve(example(), **change)
    assert changed != example()
    assert changed.fingerprint != example().fingerprint


def operations_with(**change):
    """Return the operations of the example's program, one changed by a field of its own."""
    return [
        evolve(operation, **change) if operation.what == Set(CONSTANT) else operation for operation in PROGRAM.operations
    ]


@pytest.mark.parametrize(
    "changed",
    [
        evolve(PROGRAM, replaces=False),
        evolve(PROGRAM, operations=PROGRAM.operations[::-1]),
        evolve(PROGRAM, operations=operations_with(box=((0, 1, 1),))),
        evolve(PROGRAM, operations=operations_with(what=Set(evolve(CONSTANT, shape=(1, 2))))),
        evolve(PROGRAM, operations=operations_with(what=Set(evolve(CONSTANT, dtype="float64")))),
        evolve(PROGRAM, operations=operations_with(what=Set(evolve(CONSTANT, nodes=NODES[:-1])))),
        evolve(
            PROGRAM, operations=operations_with(what=Set(evolve(CONSTANT, nodes=[evolve(NODES[0], op="rand"), *NODES[1:]])))
        ),
        evolve(PROGRAM, operations=operations_with(what=Map("copy_", ({"node": 0},), {}, [CONSTANT]))),
    ],
)
def test_every_field_of_a_program_counts(changed):
    assert changed != PROGRAM
    assert with_source(changed).fingerprint != with_source(PROGRAM).fingerprint


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Normal(0, 1), LogNormal(0, 1)),
        (Normal(0, 1), Normal(0, 1.0000000001)),
        (Bernoulli(0.5), Geometric(0.5)),
        (Uniform(-1, 1), Uniform(-1, 2)),
        (TruncatedNormal(0, 1, -2, 2), TruncatedNormal(0, 1, -2, 3)),
        (Map("pow_.Scalar", (2,)), Map("pow_.Scalar", (3,))),
        (Map("clamp_", (), {"min": 0}), Map("clamp_", (), {"max": 0})),
        (Map("pow_.Scalar", (2,)), Map("mul_.Tensor", (2,))),
    ],
)
def test_operations_that_differ_give_other_fingerprints(one, other):
    assert one != other
    assert done(one).fingerprint != done(other).fingerprint
    assert done(one, ((0, 1, 1),)).fingerprint != done(one, ((0, 2, 1),)).fingerprint


@law
@given(plans())
def test_origins_values_of_constants_and_runtime_count_in_neither(plan):
    tree = plan.tree.map(lambda spec: evolve(spec, origin=None, source=without_values(spec.source)))
    bare = evolve(plan, tree=tree, runtime=Runtime(model=object()))
    assert bare == plan
    assert hash(bare) == hash(plan)
    assert bare.fingerprint == plan.fingerprint


@law
@given(constants())
def test_values_of_constants_are_no_part_of_what_is_fingerprinted(constant):
    bare = evolve(constant, values=None)
    for what, same in (
        (Set(constant), Set(bare)),
        (Map("mul_.Tensor", ({"node": 0},), {}, [constant]), Map("mul_.Tensor", ({"node": 0},), {}, [bare])),
    ):
        assert what == same
        assert hash(what) == hash(same)
        assert done(what).fingerprint == done(same).fingerprint


@pytest.mark.parametrize("hash_seed", ["0", "1", "2"])
def test_fingerprint_and_listing_are_the_same_in_every_process(hash_seed):
    code = "from tests.specs.test_codec import example; print(example().fingerprint, example())"
    said = run_python(code, PYTHONHASHSEED=hash_seed, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    assert said == f"{example().fingerprint} {example()}\n"


UNSAID = {"blocks": [], "interleaved": 1, "granule": 1, "replicate": False, "uneven": False}
UNSAID |= {"allow_empty": False, "pad_to_multiple": 1}


def test_a_saved_plan_reads_like_the_records():
    data = json.loads(dumps(example()))
    assert data["mesh"] == {"pipe": 2, "data": 2, "tensor": 2, "expert": 2}
    assert data["steps"][0] == {"moment": "opening", "is": "Agree"}
    assert data["tree"][0]["shards"][0] == {"axis": 0, "mesh_axis": "tensor", **UNSAID, "granule": 2}
    assert data["tree"][0]["shards"][1] == {"axis": 1, "mesh_axis": "expert", **UNSAID, "blocks": [2, 2]}
    assert data["tree"][0]["origin"] == {"verb": "colwise", "pattern": "up", "where": "train.py:12"}
    assert data["tree"][0]["source"]["operations"][0] == {"what": {"mean": 0.0, "std": 0.02, "is": "Normal"}, "box": None}
    assert data["tree"][0]["source"]["operations"][-1] == {
        "what": {"value": {"float": "-inf"}, "is": "Fill"},
        "box": [[0, 1, 1], None],
    }
    assert data["random_scheme"] == RANDOM_SCHEME
    assert data["pipeline"]["example"][1] == {
        "name": "options",
        "value": {"use_cache": False, "layers": [1, None]},
        "is": "PlainInput",
    }
    assert data["pipeline"]["stages"][0]["outputs"][0] == {
        "name": "add_3",
        "shape": ["batch", "2*sequence + 1", 4],
        "dtype": "bfloat16",
        "num_bytes": 800,
        "requires_grad": True,
    }
    assert (data["schema_version"], data["fingerprint"]) == (SCHEMA_VERSION, example().fingerprint)
    assert "runtime" not in data


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "1 problem\n  plan: it is damaged: it is no JSON: Expecting value: line 1 column 1"),
        (dumps(example())[:-40], "it is damaged: it is no JSON: Unterminated string"),
        ("[]", "it is damaged: it is a JSON list, not an object"),
        (
            "{}",
            "its schema version is None, and this shardplan reads 6\n      Plan again with this version, or load it with",
        ),
        ('{"schema_version": 2}', "its schema version is 2, and this shardplan reads 6"),
        ('{"schema_version": 6}', r"required field missing.* @ plan\.mesh; .* @ plan\.tree; .* @ plan\.steps"),
    ],
)
def test_what_is_no_plan_of_this_version_is_refused(text, error):
    with pytest.raises(PlanError, match=error):
        loads(text)


OPERATIONS = ("tree", 0, "source", "operations")


def damaged(*where, value):
    """Return the example's JSON with one value exchanged."""
    data = inner = json.loads(dumps(example()))
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (damaged("seed", value=8), f"its fingerprint says '{example().fingerprint}', its contents '"),
        (
            damaged("fingerprint", value="0" * 64),
            f"its fingerprint says '{'0' * 64}', its contents '{example().fingerprint}'",
        ),
        (damaged("seed", value="seven"), r"expected int.* @ plan\.seed"),
        (damaged("mesh", value=None), r"expected Mesh @ plan\.mesh"),
        (damaged("mesh", "tensor", value=0), r"@ plan\.mesh"),
        (damaged("config", value=[]), r"@ plan\.config"),
        (damaged("tree", 1, "tags", value=[]), r"@ plan\.tree\[1\]\.tags"),
        (damaged("steps", 0, "moment", value="noon"), r"noon not in literal .* @ plan\.steps\[0\]\.moment"),
        (damaged("steps", 3, value=5), r"@ plan\.steps\[3\]"),
        (damaged("pipeline", "stages", 0, "modules", value=None), r"@ plan\.pipeline\.stages\[0\]\.modules"),
        (
            damaged("pipeline", "stages", 1, "inputs", 0, "num_bytes", value="x"),
            r"@ plan\.pipeline\.stages\[1\]\.inputs\[0\]",
        ),
        (
            damaged("pipeline", "stages", 1, "inputs", 0, "shape", 0, value=1.5),
            r"@ plan\.pipeline\.stages\[1\]\.inputs\[0\]",
        ),
        (damaged("pipeline", "example", 0, "is", value="Nope"), r"'Nope'"),
        (damaged("pipeline", "sizes", 0, "least", value=[]), r"@ plan\.pipeline\.sizes\[0\]\.least"),
        (damaged("pipeline", "stages", 0, "digest", value="0" * 64), "its fingerprint says"),
        (damaged("pipeline", "chain", value=[]), "its fingerprint says"),
        (damaged(*OPERATIONS, 0, "what", "mean", value="x"), r"@ plan\.tree\[0\]\.source\.operations\[0\]\.what\.mean"),
        (damaged(*OPERATIONS, 0, "what", "std", value=-1.0), r"'std' must be >= 0: -1\.0.*@ plan\.tree\[0\]\.source"),
        (damaged(*OPERATIONS, 5, "what", "p", value=2.0), r"p is a probability, not 2\.0.*\.operations\[5\]\.what"),
        (damaged(*OPERATIONS, 0, "box", value=[[0, 1]]), r"@ plan\.tree\[0\]\.source\.operations\[0\]\.box"),
        (damaged(*OPERATIONS, 1, "box", value=[None, [0, 4, "x"]]), r"\.operations\[1\]\.box"),
        (damaged(*OPERATIONS, 8, "what", "kwargs", value=[]), r"\.operations\[8\]\.what\.kwargs"),
        (damaged(*OPERATIONS, 9, "what", "constant", "nodes", value=3), r"\.operations\[9\]\.what\.constant\.nodes"),
        (damaged(*OPERATIONS, 9, "what", "constant", "shape", value=["two"]), r"\.what\.constant\.shape\[0\]"),
        (damaged(*OPERATIONS, 9, "what", "constant", "nodes", 0, "op", value="rand"), "its fingerprint says"),
        (damaged("tree", 0, "source", "replaces", value=False), "its fingerprint says"),
        (damaged("tree", 2, "source", "cause", value=""), "its fingerprint says"),
        (damaged("random_scheme", value=2), "its fingerprint says"),
    ],
)
def test_a_damaged_plan_is_refused_and_says_where(text, error):
    with pytest.raises(PlanError, match=f"it is damaged: .*{error}"):
        loads(text)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (damaged("tree", 1, "dtype", value="quint4x2"), r"s\.0: dtype 'quint4x2' is unknown"),
        (damaged("tree", 1, "path", value="s.4"), "two tensors claim the path 's.4'"),
        (
            damaged("tree", 0, "orig_shape", value=[7, 4]),
            "up.weight .* axis 0 has 7 entries, which granules of 2 do not divide",
        ),
        (damaged("steps", 4, "paths", value=["v"]), "v: a TakeWhole step names it, but no tensor has it"),
        (damaged("steps", 0, "is", value="Nope"), "'Nope'"),
        (damaged("steps", 10, "paths", value=["v"]), "v: an? EvaluateWhole step names it, but no tensor has it"),
        (damaged("steps", 11, "paths", value=["v"]), "v: an? EvaluateShard step names it, but no tensor has it"),
        (damaged("steps", 14, "to", value=2), "a SendCopy step is for stage 2, which is not on mesh pipe=2 data=2 tensor=2"),
        (damaged("steps", 2, "between", value=[[0, 2]]), "a MakeTieGroups step is for stage 2, which is not on mesh pipe=2"),
        (
            damaged("tree", 0, "also_on", value=[2]),
            r"up\.weight  bf16\[8@tensor, 2\|2@expert\]: stage 2 is none of the 2 stages",
        ),
        (damaged(*OPERATIONS, 0, "what", "is", value="Gumbel"), "'Gumbel'"),
    ],
)
def test_a_damaged_plan_tells_what_the_record_refused(text, cause):
    with pytest.raises(PlanError, match=cause):
        loads(text)


@pytest.mark.parametrize(
    "where", [("seed",), ("tree", 0, "tags", "calm"), (*OPERATIONS, 0, "what", "mean"), (*OPERATIONS, -1, "what", "value")]
)
def test_a_number_that_json_has_not_is_damage(where):
    with pytest.raises(PlanError, match="it is damaged"):
        loads(damaged(*where, value=float("nan")))


@law
@given(plans(), st.data())
def test_damage_is_refused_or_changes_nothing(plan, data):
    content = json.loads(dumps(plan))
    inner = content
    while inner and (inner is content or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        outer, inner = inner, inner[key]
        if not isinstance(inner, (dict, list)):
            break
    if data.draw(st.booleans()):
        del outer[key]
    else:
        outer[key] = data.draw(json_values | st.sampled_from([0, [], {}, {"is": "Agree"}]))
    with suppress(PlanError):
        assert loads(json.dumps(content)) == plan


@pytest.mark.parametrize(
    "step",
    [
        Generate(0, (), (TensorCall("w", "train:<lambda>"),)),
        Generate(0, (), (ModuleCall("", "init_weights", "train:main.<locals>.init"),)),
        Sync("up", "forward_pre", "train:<Join object>"),
    ],
)
def test_a_nameless_callable_is_not_saved(step):
    plan = Plan(Mesh(), SpecTree(), [step, step])
    (name,) = plan.callables
    cause = "a lambda, closure or other nameless function runs, but cannot be saved"
    with pytest.raises(PlanError, match=f"1 problem\n  {name}: {cause}\n      Define it with 'def' at the top level"):
        dumps(plan)


def test_init_code_of_the_model_itself_needs_no_name():
    call = ModuleCall("up", "reset_parameters", "train:main.<locals>.Up.reset_parameters", owner="up")
    plan = Plan(Mesh(), SpecTree(), [Generate(0, (), (call,))])
    assert plan.callables == ()
    assert loads(dumps(plan)) == plan


@law
@given(plans())
def test_callables_are_named_once_each(plan):
    assert len(set(plan.callables)) == len(plan.callables)
    assert not {"all_reduce", "all_gather", "reduce_scatter"} & set(plan.callables)


@law
@given(st.data(), words)
def test_a_spec_survives_within_any_plan(data, word):
    spec = data.draw(param_specs(Mesh(2, 2, 2), path=word))
    tree = SpecTree([spec])
    (again,) = loads(dumps(Plan(Mesh(2, 2, 2), tree, steps=(), folder=folder_of(tree)))).tree.specs
    assert (again, again.origin) == (spec, spec.origin)
