"""A plan survives JSON, and what is damaged, foreign or nameless is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import get_args

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from shardplan.specs import (
    Call,
    FillCall,
    Made,
    Mesh,
    ModuleCall,
    ModuleValues,
    Origin,
    OwnValues,
    ParamSpec,
    Plan,
    PlanError,
    Runtime,
    Shard,
    Source,
    SpecTree,
    Step,
    TensorCall,
    Uninitialised,
    dumps,
    loads,
)
from shardplan.specs.source import Unknown
from shardplan.specs.steps import (
    AddBiasAfterSync,
    Agree,
    Allocate,
    Broadcast,
    Generate,
    MakeGroups,
    MakeOptimizer,
    Place,
    Scatter,
    SetAttributes,
    Slice,
    Sync,
    TakeShard,
    TakeWhole,
    Tie,
    VocabParallel,
    Wrap,
)
from tests.strategies import json_values, law, param_specs, plans, words

NAMES = ("calm", "dark", "early", "fast", "green", "heavy")
CALLS = (
    ModuleCall("up", "_init_weights", "shapes.layers:Up._init_weights", owner="up"),
    TensorCall("up.weight", "train:fill"),
    FillCall("up.weight", 0.5),
)
SOURCES = (Made(CALLS), ModuleValues(), OwnValues(), Uninitialised(), Unknown())
STEPS = (
    Agree("opening"),
    MakeGroups((("data",), ("data", "tensor"))),
    Generate(0, ("up.weight",), CALLS, scratch=("s.1",)),
    TakeWhole(0, ("s.1",)),
    TakeShard(0, ("s.2",)),
    Allocate(0, ("s.3",)),
    Scatter(0, ("up.weight",), ("tensor",)),
    Broadcast(0, ("up.weight",), ("data",)),
    Slice(0, ("up.weight",)),
    Place(0, ("up.weight",)),
    Tie(0, "up.weight", ("head.weight",)),
    SetAttributes("up", {"out_features": 4, "names": ["a", {"b": None}]}),
    VocabParallel("up"),
    AddBiasAfterSync("up"),
    Sync("up", "forward_post", "all_gather", axis=-1),
    Sync("up", "backward_post", "train:join", mesh_axis="data"),
    Agree("closing"),
    MakeOptimizer(),
    Wrap("deepspeed"),
)


def example():
    """A plan with a source of each kind and a step of each kind; its tags and its config come in the order of a set."""
    weight = ParamSpec(
        "up.weight",
        (8, 4),
        "bfloat16",
        shards=(Shard(0),),
        also_on=(1,),
        tags=dict.fromkeys(set(NAMES), 1),
        tie=("head.weight",),
        source=SOURCES[0],
        origin=Origin("colwise", "up", "train.py:12"),
    )
    others = (ParamSpec(f"s.{i}", (), "float32", source=source) for i, source in enumerate(SOURCES))
    config = {"zero_optimization": {"stage": 1}, "betas": [0.9, 0.95], **dict.fromkeys(set(NAMES), 1)}
    return Plan(Mesh(2, 2, 2), SpecTree([weight, *others]), STEPS, target="deepspeed", config=config, seed=7)


def filled(value):
    tree = SpecTree([ParamSpec("w", (4,), "float32")])
    return Plan(Mesh(), tree, [Generate(0, ("w",), (FillCall("w", value),))])


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


def test_every_kind_of_step_source_and_call_survives_json():
    assert {type(step) for step in STEPS} == set(get_args(Step))
    assert {type(source) for source in SOURCES} == set(get_args(Source))
    assert {type(call) for call in CALLS} == set(get_args(Call))
    again = loads(dumps(example()))
    assert again.steps == STEPS
    assert again == example()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_json_has_not_are_refused_where_they_are_written(value):
    with pytest.raises(ValueError, match="value: a plan holds plain, finite JSON values, not"):
        filled(value)
    with pytest.raises(ValueError, match="config: a plan holds plain, finite JSON values, not"):
        evolve(example(), config={"clip": value})


@law
@given(plans(), plans())
def test_plans_are_equal_if_and_only_if_their_fingerprints_are(one, other):
    assert (one == other) == (one.fingerprint == other.fingerprint)


@pytest.mark.parametrize("make", [filled, lambda value: evolve(example(), config={"clip": value})])
@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0)])
def test_equal_numbers_of_different_types_keep_that_law(make, one, other):
    assert (make(one) == make(other)) == (make(one).fingerprint == make(other).fingerprint)


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
    ],
)
def test_every_field_counts_in_equality_and_fingerprint(change):
    changed = evolve(example(), **change)
    assert changed != example()
    assert changed.fingerprint != example().fingerprint


@law
@given(plans())
def test_origins_and_runtime_count_in_neither(plan):
    bare = evolve(plan, tree=plan.tree.map(lambda spec: evolve(spec, origin=None)), runtime=Runtime(model=object()))
    assert bare == plan
    assert bare.fingerprint == plan.fingerprint


@pytest.mark.parametrize("hash_seed", ["0", "1", "2"])
def test_fingerprint_and_listing_are_the_same_in_every_process(hash_seed):
    code = "from tests.specs.test_codec import example; print(example().fingerprint, example())"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{example().fingerprint} {example()}\n"


def test_a_saved_plan_reads_like_the_records():
    data = json.loads(dumps(example()))
    assert data["mesh"] == {"pipe": 2, "data": 2, "tensor": 2}
    assert data["steps"][0] == {"moment": "opening", "is": "Agree"}
    assert data["tree"][0]["shards"] == [{"axis": 0, "mesh_axis": "tensor"}]
    assert data["tree"][0]["origin"] == {"verb": "colwise", "pattern": "up", "where": "train.py:12"}
    assert (data["schema_version"], data["fingerprint"]) == (1, example().fingerprint)
    assert "runtime" not in data


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "1 problem\n  plan: it is damaged: it is no JSON: Expecting value: line 1 column 1"),
        (dumps(example())[:-40], "it is damaged: it is no JSON: Unterminated string"),
        ("[]", "it is damaged: it is a JSON list, not an object"),
        (
            "{}",
            "its schema version is None, and this shardplan reads 1\n      Plan again with this version, or load it with",
        ),
        ('{"schema_version": 2}', "its schema version is 2, and this shardplan reads 1"),
        ('{"schema_version": 1}', r"required field missing.* @ plan\.mesh; .* @ plan\.tree; .* @ plan\.steps"),
    ],
)
def test_what_is_no_plan_of_this_version_is_refused(text, error):
    with pytest.raises(PlanError, match=error):
        loads(text)


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
        (damaged("tree", 0, "source", "calls", 2, "value", value="x"), r"@ plan\.tree\[0\]\.source\.calls\[2\]\.value"),
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
        (damaged("tree", 0, "orig_shape", value=[7, 4]), "up.weight .* axis 0 has 7 entries, mesh axis 'tensor' has 2"),
        (damaged("steps", 3, "paths", value=["v"]), "v: a TakeWhole step names it, but no tensor has it"),
        (damaged("steps", 0, "is", value="Nope"), "'Nope'"),
    ],
)
def test_a_damaged_plan_tells_what_the_record_refused(text, cause):
    with pytest.raises(PlanError, match=cause):
        loads(text)


@pytest.mark.parametrize("where", [("seed",), ("tree", 0, "tags", "calm"), ("tree", 0, "source", "calls", 2, "value")])
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
    (again,) = loads(dumps(Plan(Mesh(2, 2, 2), SpecTree([spec]), steps=()))).tree.specs
    assert (again, again.origin) == (spec, spec.origin)
