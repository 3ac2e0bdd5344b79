"""The work of a step has the step's name, and an error on one rank keeps it from no collective that other ranks wait for."""

from __future__ import annotations

from typing import get_args

import pytest
from attrs import define

from shardplan.functional import DryRun, plan_build
from shardplan.functional.interpreter import work
from shardplan.functional.interpreter.interpret import interpret
from shardplan.specs import Mesh
from shardplan.specs.steps import LayoutStep, Step
from tests.helpers.models import schedule

SHARED = {"Nothing", "Evaluate", "Take", "Message", "ChangeLayout"}
SHARING = {"EvaluateWhole", "EvaluateShard", "TakeWhole", "TakeShard", "Scatter", "Broadcast", "SendCopy"}


def test_work_has_the_name_of_its_step_or_is_shared():
    steps = {step.__name__ for step in get_args(Step)} - {step.__name__ for step in get_args(LayoutStep)}
    assert {record.__name__ for record in get_args(work.Work)} == (steps - SHARING) | SHARED


def test_every_work_says_whether_other_ranks_wait_for_it():
    waited_for = {record.__name__ for record in get_args(work.Work) if record.collective}
    assert waited_for == {"Agree", "MakeGroups", "MakeTieGroups", "CheckLoaded", "Message", "Wrap"}


@define
class Failing(DryRun):
    """Cannot evaluate; the closing agreement does not end it."""

    error: BaseException | None = None

    def agree(self, plan, error):
        super().agree(plan, None)
        self.error = error

    def evaluate(self, pieces, seed):
        msg = "no room"
        raise MemoryError(msg)

    def place(self, spec, tensor):
        pytest.fail("nothing is placed after an error")


@pytest.mark.parametrize("strategy", ["scatter", "broadcast"])
@pytest.mark.parametrize("rank", [0, 1])
def test_after_an_error_a_rank_joins_every_collective_and_does_nothing_else(strategy, rank):
    plan = plan_build(schedule("plain", Mesh(tensor=2)), strategy=strategy)
    failing, whole = Failing(rank), DryRun(rank)
    interpret(plan, plan.mesh.coordinate(rank), failing, error=None if rank == 0 else MemoryError("before"))
    interpret(plan, plan.mesh.coordinate(rank), whole)
    assert failing.ledger.collectives == whole.ledger.collectives
    assert failing.ledger.num_groups == whole.ledger.num_groups
    assert isinstance(failing.error, MemoryError)
