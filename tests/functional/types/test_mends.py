"""Mends that an error offers, applied word for word: the schedule is accepted, and ``verify`` finds it right."""

from __future__ import annotations

import re

import pytest
import torch
from attrs import evolve
from torch import nn

from shardplan.functional import create_schedule, plan_build, verify
from shardplan.functional.types import mends
from shardplan.specs import Mesh, PlanError
from tests.exam.judge import all_entries
from tests.helpers.models import llama

ENTRIES = {entry.name: entry for entry in all_entries()}

MENDS = {
    "outputs of a row split never summed": "sch.at['b'].sync('forward_post', 'all_reduce')",
    "outputs of a row split summed twice": "Leave out forward_post all_reduce@tensor at 'body'",
    "outputs of a row split averaged": "Leave out forward_post divide@tensor at 'body.2'",
    "softmax of summands, summed": "Leave out forward_post all_reduce@tensor at 'act', "
    "and sch.at['down'].sync('forward_post', 'all_reduce')",
    "gradient behind a column split never summed": "sch.at['body.0'].sync('backward_post', 'all_reduce')",
    "gradient of a norm on whole activations summed": (
        "Leave out gradient of weight summed@tensor at 'body.0', gradient of bias summed@tensor at 'body.0'"
    ),
    "a whole trained scale within split code": "sch.at['body.scale'].sum_gradient()",
    "routing weights' gradients of split experts nowhere summed": "sch.at['experts']"
    ".sync('backward_post', 'all_reduce', which=1)",
    "a mean of whole features that multiplies split ones": "sch.at['body.gate'].sync('backward_pre', 'all_reduce')",
    "the positional key of latent attention, nowhere summed": "sch.at['kv_a']"
    ".sync('backward_pre', 'all_reduce', features=(8, 10))",
    "softmax over split features": "sch.at['up'].sync('forward_post', 'all_gather', axis=-1)"
    ".at['middle'].sync('backward_pre', 'all_gather', axis=-1)",
    "split features cut into the whole number of heads": "sch.at['up'].sync('forward_post', 'all_gather', axis=-1)"
    ".at['middle'].sync('backward_pre', 'all_gather', axis=-1)",
    "hidden features returned beside the output, split": "sch.at['beside'].sync('forward_post', 'all_gather', axis=-1)",
    "outputs gathered before a whole layer, as if it were split": "Leave out forward_pre all_gather(axis=-1)@tensor at "
    "'body.2', and sch.at['body.1'].sync('forward_post', 'all_gather', axis=-1)",
    "dropout on split features, drawn alike on all ranks": "sch.at['middle'].fork_rng()",
    "a block drawn by each rank, with dropout on its whole input": "sch.at['body.0'].share_rng()",
    "outputs of a row split summed over data": "Leave out forward_post all_reduce@data at 'body.2', "
    "and sch.at['body.2'].sync('forward_post', 'all_reduce')",
    "layer norm over split features": "sch.at['up'].sync('forward_post', 'all_gather', axis=-1)"
    ".at['middle'].sync('backward_pre', 'all_gather', axis=-1)",
}
"""The first mend of wrong entries of the exam, of many kinds."""


def refused(sch, inputs):
    """Return the problems of a schedule."""
    with pytest.raises(PlanError) as caught:
        plan_build(sch, init_weights=False, example_inputs=inputs)
    return caught.value.problems


def applied(sch, mend):
    """Return a schedule with a mend, as a reader applies it."""
    for told, module in re.findall(r"(?:Leave out|,) ([^']*?) at '([^']*)'", mend):
        kept = [step for step in sch.layout if (step.describe(), step.module) != (told, module)]
        assert len(kept) < len(sch.layout), mend
        sch = evolve(sch, layout=tuple(kept))
    if code := re.search(r"sch\.at\[.*\)", mend):
        sch = eval(code[0], {"sch": sch})
    return sch


@pytest.mark.parametrize("name", MENDS)
def test_a_mend_mends(name):
    torch.manual_seed(0)
    sch, inputs = ENTRIES[name].make()
    fixes = list(dict.fromkeys(problem.fix for problem in refused(sch, inputs)))
    assert MENDS[name] in fixes
    for fix in fixes:
        sch = applied(sch, fix)
    assert plan_build(sch, init_weights=False, example_inputs=inputs)
    assert verify(sch, inputs).ok


class Bare(nn.Module):
    """Code that uses split tensors of lists, after other code in the same module."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.ups = nn.ParameterList([nn.Parameter(torch.randn(16, 32)) for _ in range(2)])
        self.downs = nn.ParameterList([nn.Parameter(torch.randn(32, 16)) for _ in range(2)])

    def forward(self, x):
        x = self.first(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + torch.relu(x @ up) @ down
        return x


BARE = create_schedule(Bare(), Mesh(tensor=2)).at["ups.*"].shard(axis=1).at["downs.*"].shard(axis=0)
X = {"x": torch.randn(4, 16)}


def test_products_with_bare_tensors_are_summed():
    (problem,) = refused(BARE, X)
    assert problem.fix == "sch.at['downs.*'].sum_products('outputs').at['ups.*'].sum_products('gradients')"
    sch = applied(BARE, problem.fix)
    assert plan_build(sch, init_weights=False, example_inputs=X)
    assert verify(sch, X).ok


def test_products_that_are_not_computed_are_not_summed():
    sch = create_schedule(Bare(), Mesh(tensor=2)).at["first.weight"].sum_products("gradients")
    assert plan_build(sch, init_weights=False, example_inputs=X), "its module multiplies with it"
    sch = create_schedule(Bare(), Mesh(tensor=2)).at["first.bias"].sum_products("gradients")
    (problem,) = refused(sch, X)
    assert problem.path == "first.bias"
    assert "no product with it is computed" in problem.cause


def test_where_nothing_mends_it_the_error_says_so():
    (problem,) = refused(*ENTRIES["queries, keys and values cut as one block"].make())
    assert problem.fix == mends.NONE


def test_all_layers_share_a_mend():
    sch = create_schedule(llama(num_hidden_layers=4), Mesh(tensor=2))
    sch = sch.at["**.{q,k,v,gate,up}_proj.weight"].shard(axis=0).at["**.{o,down}_proj.weight"].shard(axis=1)
    tokens = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    for problem in refused(sch, tokens):
        sch = applied(sch, problem.fix)
    assert verify(sch, tokens).ok
