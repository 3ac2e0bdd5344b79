"""Split parts that the example inputs do not reach are not followed: neither proven, nor refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import audit, create_schedule, plan_build
from shardplan.specs import Mesh, PlanError

ROWS = {"x": torch.empty(2, 8)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x))


class Model(nn.Module):
    """Takes rows, and an image if there is one."""

    def __init__(self, num=1):
        super().__init__()
        self.text = nn.Sequential(*(Block() for _ in range(num)))
        self.vision = Block()

    def forward(self, x, image=None):
        x = self.text(x)
        return x if image is None else x + self.vision(image)


def split(num=1):
    with torch.device("meta"):
        sch = create_schedule(Model(num), Mesh(tensor=2))
    return sch.at["**.up"].colwise().at["**.down"].rowwise()


def said(plan):
    return [str(lost) for lost in plan.equality.unfollowed]


def test_a_module_that_the_inputs_do_not_reach_is_not_followed():
    plan = plan_build(split(), example_inputs=ROWS)
    assert said(plan) == [
        "vision.up: the example inputs do not reach it: nothing is computed with its split weight and bias",
        "vision.down: the example inputs do not reach it: nothing is computed with its split weight",
    ]
    assert audit(plan).proof("equal").answer == "not followed"
    reached = plan_build(split(), example_inputs={**ROWS, "image": torch.empty(2, 8)})
    assert audit(reached).proof("equal").holds


def test_a_split_without_any_synchronisation_is_not_proven_either():
    with torch.device("meta"):
        sch = create_schedule(Model(), Mesh(tensor=2))
    bare = sch.at["vision.up"].shard("weight", axis=0).shard("bias", axis=0).set(out_features=8)
    assert said(plan_build(bare, example_inputs=ROWS))


def test_repeated_layers_are_reached_by_the_layer_that_runs_for_them():
    assert len(said(plan_build(split(num=8), example_inputs=ROWS))) == 2


def test_a_trusted_module_need_not_be_reached():
    assert said(plan_build(split().at["vision"].trust("it is tried elsewhere"), example_inputs=ROWS)) == []


def test_what_is_whole_need_not_be_reached():
    with torch.device("meta"):
        sch = create_schedule(Model(), Mesh(tensor=2)).at["text.*.up"].colwise().at["text.*.down"].rowwise()
    assert said(plan_build(sch, example_inputs=ROWS)) == []


def test_a_synchronised_module_that_code_goes_past_is_still_refused():
    class Direct(Model):
        def forward(self, x):
            return nn.functional.linear(self.vision.up(x), self.vision.down.weight)

    with torch.device("meta"):
        sch = create_schedule(Direct(), Mesh(tensor=2)).at["vision.up"].colwise().at["vision.down"].rowwise()
    with pytest.raises(PlanError, match=r"vision\.down: it is not called in this forward pass"):
        plan_build(sch, example_inputs=ROWS)


def test_a_tied_module_that_is_not_called_where_the_other_one_is():
    """Beside images a model may embed its tokens by one of two modules that hold the same weight."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.encoder = nn.Embedding(16, 8), nn.Embedding(16, 8)
            self.encoder.weight = self.shared.weight

        def forward(self, ids):
            return self.shared(ids)

    with torch.device("meta"):
        sch = create_schedule(Tied(), Mesh(tensor=2)).at["{shared,encoder}"].vocab_parallel()
    plan = plan_build(sch, example_inputs={"ids": torch.zeros(2, 4, dtype=torch.long)})
    assert audit(plan).proof("equal").holds
