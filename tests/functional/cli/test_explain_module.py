"""A module of a saved plan is explained: what it holds, how it computes, and the types of all that it computes."""

from __future__ import annotations

import json

import pytest
import torch
from attrs import evolve
from click.testing import CliRunner
from torch import nn

from shardplan.functional import create_schedule, plan_build
from shardplan.functional.cli import main
from shardplan.functional.cli.explain_module import explain_module, module_paths
from shardplan.specs import ActivationType, CallType, Equality, Mesh, ModuleTypes, Unfollowed, dumps

WHOLE = ActivationType("float32", ("4", "8"))
SPLIT = ActivationType("float32", ("4", "32@tensor"), "split")
SUMMAND = ActivationType("float32", ("4", "8"), "summand")


def planned():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(4)))
    sch = create_schedule(model, Mesh(tensor=2)).at["*.0"].colwise().at["*.2"].rowwise()
    return plan_build(sch.at["*.1"].trust("a kernel of our own", gives="split", axis=-1))


@pytest.fixture(scope="module")
def bare():
    return planned()


@pytest.fixture(scope="module")
def proven(bare):
    """Layer 1 was followed for layers 2 and 3."""
    modules = [ModuleTypes("0", [WHOLE], [WHOLE]), ModuleTypes("1", [WHOLE], [WHOLE], ["2", "3"])]
    modules += [ModuleTypes(f"{layer}.0", [WHOLE], [SPLIT]) for layer in (0, 1)]
    calls = [
        call
        for layer in (0, 1)
        for call in (
            CallType(f"{layer}.0", "linear", "train.py:3", SPLIT),
            CallType(f"{layer}.2", "linear", "train.py:3", SUMMAND),
            CallType(f"{layer}.2", "all_reduce", "", WHOLE),
        )
    ]
    lost = [Unfollowed("1.1", "relu", "it has no rule")]
    return evolve(bare, equality=Equality(modules, calls, lost, (), "given", "2.13.0", bare.layout_digest))


def test_all_modules_can_be_asked_for(bare, proven):
    assert set(module_paths(bare)) >= {"", "0", "0.0", "0.2", "3.2"}
    assert {"2", "3.0"} <= set(module_paths(proven))


def test_a_module_prints_the_types_within_it(proven):
    assert str(explain_module(proven, "0")).splitlines() == [
        "0  f32[4, 8] -> f32[4, 8]",
        "",
        "holds     0.0.weight  f32[32@tensor, 8]",
        "          0.0.bias    f32[32@tensor]",
        "          0.2.weight  f32[8, 32@tensor]",
        "          0.2.bias    f32[8]",
        "changes   0.0  backward_post all_reduce@tensor; out_features=16",
        "          0.2  forward_post all_reduce@tensor; in_features=16; adds its bias after the sum",
        "types     module  operator    result              line",
        "          0.0     linear      f32[4, 32@tensor]   train.py:3",
        "          0.2     linear      f32[4, 8]{+tensor}  train.py:3",
        "          0.2     all_reduce  f32[4, 8]",
        "trusted   0.1  gives split along axis -1: a kernel of our own",
    ]


def test_a_repeated_layer_is_explained_by_the_layer_that_was_followed(proven):
    found = explain_module(proven, "3")
    assert (found.followed, len(found.calls), str(found.types)) == ("1", 3, "f32[4, 8] -> f32[4, 8]")
    lines = str(found).splitlines()
    assert lines[0] == "3  f32[4, 8] -> f32[4, 8]"
    assert "types     as in 1, which was followed for it" in lines
    assert "lost      1.1 (relu): it has no rule" in lines
    assert "holds     3.0.weight  f32[32@tensor, 8]" in lines
    assert explain_module(proven, "2.0").followed == "1.0"


def test_the_whole_model_says_which_layers_stand_for_which(proven):
    text = str(explain_module(proven, ""))
    assert text.startswith("(model)\n")
    assert "{2..3}: as in 1" in text
    assert "trusted   {0..3}.1  gives split along axis -1: a kernel of our own" in text


def test_without_evidence_types_are_not_known(bare):
    assert "types     not known: no call within it was followed" in str(explain_module(bare, "0"))


def test_the_command_knows_modules_and_tensors(proven, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(dumps(proven))

    def run(*args):
        return CliRunner().invoke(main, ["explain", str(file), *args])

    assert run("0").output == f"{explain_module(proven, '0')}\n"
    assert run("0.0.weight").output.startswith("0.0.weight  f32[32@tensor, 8]\n")
    said = json.loads(run("0", "--json").output)
    assert said["calls"][0]["result"] == {"dtype": "float32", "axes": ["4", "32@tensor"], "kind": "split"}
    assert said["followed"] == "0"
    assert "no tensor and no module of the plan has this path" in run("5").output


def test_print_shows_repeated_layers_once(proven):
    lines = str(proven).splitlines()
    assert "{0..3}    f32[4, 8] -> f32[4, 8]" in lines
    assert "{0..3}.0  f32[4, 8] -> f32[4, 32@tensor]" in lines
