"""Schedules from rules: a pattern, and a name for each axis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import audit, plan_build
from shardplan.functional.frontends import schedule_from_rules
from shardplan.specs import Mesh, PlanError
from tests.helpers.models import llama, split_llama

RULES = [
    ("model.embed_tokens.weight", ("vocab", "embed")),
    ("**.q_proj.weight", ("heads", "embed")),
    ("**.[kv]_proj.weight", ("kv_heads", "embed")),
    ("**.o_proj.weight", ("embed", "heads")),
    ("**.{gate,up}_proj.weight", ("mlp", "embed")),
    ("**.down_proj.weight", ("embed", "mlp")),
    ("**.{*_layernorm,norm}.weight", ("embed",)),
    ("lm_head.weight", ("vocab", "embed")),
]
INPUTS = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}


def problems(sch):
    with pytest.raises(PlanError) as caught:
        plan_build(sch)
    return str(caught.value)


def small():
    with torch.device("meta"):
        return nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32, bias=False))


def test_rules_give_the_plan_that_verbs_give():
    mesh = Mesh(tensor=2)
    ruled = plan_build(schedule_from_rules(llama(), mesh, RULES), example_inputs=INPUTS)
    said = plan_build(split_llama(llama(), mesh), example_inputs=INPUTS)
    assert ruled.tree == said.tree
    assert set(ruled.steps) == set(said.steps)
    assert audit(ruled).ok


def test_the_first_rule_that_matches_counts_and_others_are_named():
    rules = [("1.weight", ("mlp", None)), ("1.bias", ("mlp",)), ("*.weight", (None, None)), ("3.weight", ("embed", "mlp"))]
    text = problems(schedule_from_rules(small(), Mesh(tensor=2), rules))
    assert "3.weight: all tensors that it matches are matched by rules before it\n      Move it up, or drop it" in text
    sch = schedule_from_rules(small(), Mesh(tensor=2), rules[:3])
    assert [spec.type for spec in sch.tree.values()] == [
        "f32[96, 32]",
        "f32[128@tensor, 32]",
        "f32[128@tensor]",
        "f32[32, 128]",
    ]


def test_unmatched_tensors_are_listed_or_tagged():
    rules = [("1.weight", ("mlp", "embed")), ("1.bias", ("mlp",))]
    text = problems(schedule_from_rules(small(), Mesh(tensor=2), rules))
    assert "0.weight  f32[96, 32]: no rule matches it" in text
    assert "3.weight  f32[32, 128]: no rule matches it" in text
    sch = schedule_from_rules(small(), Mesh(tensor=2), rules, allow_unmatched=True)
    assert not sch.problems
    assert [path for path, spec in sch.tree.items() if spec.tags] == ["0.weight", "3.weight"]


def test_names_are_split_over_other_mesh_axes_on_request():
    rules = [("1.weight", ("mlp", "embed"))]
    sch = schedule_from_rules(small(), Mesh(data=2), rules, mesh_axes={"embed": "data"}, allow_unmatched=True)
    assert sch.tree["1.weight"].type == "f32[128, 32@data]"


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([("1.weight", ("mlp",))], "the rule '1.weight' names 1 axes, ('mlp',), and it has 2"),
        ([("9.weight", ("mlp", None))], "9.weight: the rule matches no tensor"),
        ([("1.weight", "mlp")], "rules[0]: it is no pair of a pattern and axis names: ('1.weight', 'mlp')"),
        ([("1.[weight", ("mlp", None))], "rules[0]: '1.[weight': "),
        ([("1.weight", ("mlp", 3))], "rules[0]: the name of an axis is a string or None, not 3"),
        ("1.weight", "rules: they are a list of (pattern, axis names), not '1.weight'"),
        ([("1.weight", ("mlp", None)), ("1.bias", (None,))], "1.bias  f32[128@tensor]: its rule leaves axis 0 whole"),
    ],
)
def test_wrong_rules_are_named(rules, text):
    assert text in problems(schedule_from_rules(small(), Mesh(tensor=2), rules, allow_unmatched=True))


def test_a_mesh_axis_that_is_none_is_named():
    sch = schedule_from_rules(small(), Mesh(tensor=2), [], mesh_axes={"mlp": "model"})
    assert "mesh_axes['mlp']: mesh axis 'model' is unknown\n      There are data, expert, tensor" in problems(sch)
