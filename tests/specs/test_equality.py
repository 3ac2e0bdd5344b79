"""The evidence of a plan: printed, saved beside the plan, outside its fingerprint, bound to the layout that was followed."""

from __future__ import annotations

import json

import pytest
from attrs import evolve

from shardplan.functional import audit, diff
from shardplan.specs import (
    ActivationType,
    CallType,
    Equality,
    Failure,
    Mesh,
    ModuleTypes,
    ParamSpec,
    Plan,
    PlanError,
    Proof,
    Shard,
    SpecTree,
    Trust,
    Unfollowed,
    dumps,
    loads,
)
from shardplan.specs.layout_steps import SetAttributes, SetToLocalSize, Sync
from shardplan.specs.steps import Allocate, MakeGroups, Place, Wrap

SPLIT = ActivationType("float32", ("2", "16", "4096@tensor"), "split")
SUMMAND = ActivationType("bfloat16", ("2", "16", "4096"), "summand")
WHOLE = ActivationType("float32", ("2", "16", "4096"))
TOPK = Unfollowed("layers.0.mlp", "topk", "it has no rule for a split axis")


TWO, FIRST = Mesh(tensor=2), (Shard(0),)


def plan(mesh=TWO, *, steps=(), shards=FIRST, equality=None, **more):
    tree = SpecTree([ParamSpec("layers.0.mlp.weight", (8, 4), "float32", shards=shards)])
    paths = ("layers.0.mlp.weight",)
    made = Plan(mesh, tree, [MakeGroups((("tensor",),)), Allocate(0, paths), Place(0, paths), *steps, Wrap(None)], **more)
    return made if equality is None else evolve(made, equality=evolve(equality, layout=made.layout_digest))


EVIDENCE = Equality(
    modules=[ModuleTypes("layers.0.mlp", [WHOLE], [SPLIT], repeats=["layers.1.mlp"])],
    calls=[CallType("layers.0.mlp", "linear", "mlp.py:7", SPLIT)],
    trusted=[Trust("layers.0.mlp", "a kernel of our own", "split", -1)],
    inputs="made",
    torch="2.13.0",
)


@pytest.mark.parametrize(
    ("kind", "axes", "text"),
    [
        ("whole", "4096", "f32[2, 16, 4096]"),
        ("split", "4096@tensor", "f32[2, 16, 4096@tensor]"),
        ("summand", "4096", "f32[2, 16, 4096]{+tensor}"),
        ("own", "4096", "f32[2, 16, 4096]{own tensor}"),
        ("unknown", "4096", "f32[2, 16, 4096]{?}"),
    ],
)
def test_a_type_is_printed_as_the_type_of_a_tensor(kind, axes, text):
    assert str(ActivationType("float32", ("2", "16", axes), kind)) == text


def test_a_type_of_an_element_that_plans_do_not_know_is_printed_by_its_name():
    assert str(ActivationType("uint16", ("4",))) == "uint16[4]"


def test_a_split_type_names_its_axis():
    with pytest.raises(ValueError, match="names the axis that is split"):
        ActivationType("float32", ("4",), "split")


def test_a_module_says_what_it_takes_and_gives():
    assert str(EVIDENCE.modules[0]) == "f32[2, 16, 4096] -> f32[2, 16, 4096@tensor]"
    assert str(ModuleTypes("", (), (SUMMAND,))) == "nothing -> bf16[2, 16, 4096]{+tensor}"


def test_trust_has_a_reason_and_an_axis_where_it_is_split():
    with pytest.raises(ValueError, match="is trusted without a reason"):
        Trust("moe", " ")
    with pytest.raises(ValueError, match="axis is for what is split"):
        Trust("moe", "known", "whole", 1)
    with pytest.raises(ValueError, match="axis is for what is split"):
        Trust("moe", "known", "split")


def test_evidence_stands_beside_the_plan():
    bare, proven = plan(), plan(equality=EVIDENCE)
    assert bare == proven
    assert hash(bare) == hash(proven)
    assert bare.fingerprint == proven.fingerprint
    assert "equality" not in proven.canonical_fields


def test_evidence_is_saved_with_the_plan_and_old_files_have_none():
    proven = plan(equality=evolve(EVIDENCE, unfollowed=[TOPK]))
    assert loads(dumps(proven)).equality == proven.equality
    data = json.loads(dumps(proven))
    assert data.pop("equality")["torch"] == "2.13.0"
    assert loads(json.dumps(data)).equality is None
    assert json.loads(dumps(plan())) == data
    data["equality"] = {"modules": 3}
    with pytest.raises(PlanError, match="it is damaged"):
        loads(json.dumps(data))


def test_trusts_are_part_of_the_plan_and_absent_where_there_are_none():
    trusted = plan(trusts=EVIDENCE.trusted)
    assert trusted.fingerprint != plan().fingerprint
    assert loads(dumps(trusted)) == trusted
    assert "trusts" not in json.loads(dumps(plan()))
    changes = {change.path: (change.before, change.after) for change in diff(plan(), trusted).fields}
    assert changes["trusts.layers.0.mlp"] == (None, "gives split along axis -1: a kernel of our own")


def equal(plan):
    return audit(plan).proof("equal")


def last(plan):
    return str(audit(plan)).splitlines()[-1]


def with_a_sum(**more):
    """A plan without errors: its split weight is summed."""
    return plan(steps=[Sync("layers.0.mlp", "forward_post", "all_reduce")], **more)


def test_without_inputs_nothing_is_proven():
    proof = equal(with_a_sum())
    assert (proof.answer, proof.holds) == ("not followed", False)
    assert str(proof) == "equal   the split model computes what the whole one does: not followed: no example inputs"
    assert audit(with_a_sum()).ok
    assert last(with_a_sum()) == "ok      yes, but equal not followed: no example inputs"


def test_evidence_proves_it_and_made_inputs_are_said():
    proven = with_a_sum(equality=EVIDENCE)
    assert str(equal(proven)).endswith("whole one does: holds (1 cases; inputs made from the configuration)")
    assert last(proven) == "ok      yes, equal proven"
    assert str(equal(with_a_sum(equality=evolve(EVIDENCE, inputs="given")))).endswith("holds (1 cases)")


def test_what_is_not_followed_is_named_and_folded():
    layers = [evolve(TOPK, path=f"layers.{number}.mlp") for number in range(32)]
    one = with_a_sum(equality=evolve(EVIDENCE, unfollowed=layers))
    named = "layers.{0..31}.mlp (topk): it has no rule for a split axis"
    assert str(equal(one)).endswith(f"does: not followed: {named}")
    assert last(one) == f"ok      yes, but equal not followed: {named}"
    many = evolve(EVIDENCE, unfollowed=[Unfollowed("", f"operator_{letter}", "no rule") for letter in "abcdefg"])
    lines = str(equal(with_a_sum(equality=many))).splitlines()
    assert lines[0].endswith("not followed in 7 places")
    assert [line.strip() for line in lines[1:]] == [*(f"(model) (operator_{x}): no rule" for x in "abcde"), "and 2 more"]
    assert last(with_a_sum(equality=many)).endswith("(operator_a): no rule, and 6 more")


def test_evidence_of_another_layout_is_none():
    proven = with_a_sum(equality=EVIDENCE)
    kept = evolve(proven, seed=3)
    assert equal(kept).holds
    lost = evolve(proven, steps=[step for step in proven.steps if not isinstance(step, Sync)])
    assert "another layout than the one that was followed" in str(equal(lost))
    assert equal(loads(dumps(proven))).holds


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(data=8), Mesh(pipe=2, data=2)])
def test_where_nothing_is_split_it_holds_by_itself(mesh):
    whole = plan(mesh, steps=[SetToLocalSize("layers.0.mlp", "out_features", "weight", 0)])
    assert equal(whole).holds
    assert equal(plan(mesh, steps=[Sync("layers.0.mlp", "forward_post", "all_reduce")])).holds


def test_an_attribute_that_is_set_changes_the_model_on_one_rank_too():
    proof = equal(plan(Mesh(), steps=[SetAttributes("layers.0.mlp", {"num_heads": 8})]))
    assert str(proof).endswith("not followed: layers.0.mlp: no example inputs, and num_heads=8 is set")


def test_a_split_over_experts_is_not_trivial():
    assert equal(plan(Mesh(data=2, expert=2), shards=(Shard(0, "expert"),))).answer == "not followed"


def test_trusted_modules_are_listed():
    trusts = [Trust(f"layers.{number}.mlp", "a kernel of our own") for number in range(4)]
    text = str(audit(with_a_sum(trusts=trusts)))
    assert "trusted   layers.{0..3}.mlp gives whole: a kernel of our own" in text


def test_a_law_that_fails_is_not_merely_not_followed():
    proof = Proof("equal", 3, (Failure("mlp", "summed twice"),), (TOPK,))
    assert (proof.answer, proof.holds) == ("fails", False)
    assert str(proof).endswith("fails in 1 cases")


def test_a_plan_with_evidence_prints_types_where_modules_begin_and_end():
    layer = ModuleTypes("layers.0.mlp", [WHOLE], [SPLIT], [f"layers.{number}.mlp" for number in range(1, 32)])
    proven = plan(equality=evolve(EVIDENCE, modules=[layer, ModuleTypes("", [], [WHOLE])], unfollowed=[TOPK]))
    bare, told = str(plan()).splitlines(), str(proven).splitlines()
    assert told[: len(bare)] == bare
    assert told[len(bare) :] == [
        "",
        "types of activations, from inputs made from the configuration, by torch 2.13.0",
        "layers.{0..31}.mlp  f32[2, 16, 4096] -> f32[2, 16, 4096@tensor]",
        "(model)             nothing -> f32[2, 16, 4096]",
        "not followed  layers.0.mlp (topk): it has no rule for a split axis",
    ]
