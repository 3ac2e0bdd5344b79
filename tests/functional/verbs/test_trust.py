"""The user's word for code that nobody can follow: what it may be, where it stands, and who prints it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.functional import audit, create_schedule, plan_build
from shardplan.specs import Mesh, PlanError, Trust, dumps, loads
from shardplan.specs.layout_steps import Sync

REASON = "a kernel of our own"


def schedule(num=2):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(num)))
    return create_schedule(model, Mesh(tensor=2)).at["*.0"].colwise().at["*.2"].rowwise()


def problem_of(sch):
    with pytest.raises(PlanError) as caught:
        plan_build(sch)
    return str(caught.value)


def join(tensor, group):
    return tensor


def test_a_trusted_module_is_noted_in_the_schedule_the_plan_and_every_audit():
    sch = schedule().at["*.0"].trust(REASON, gives="split", axis=-1).at["1"].trust(REASON)
    split = [Trust(f"{number}.0", REASON, "split", -1) for number in range(2)]
    assert sch.trusts == (*split, Trust("1", REASON))
    plan = plan_build(sch)
    assert plan.trusts == sch.trusts
    assert loads(dumps(plan)).trusts == sch.trusts
    lines = [f"trusted   {{0..1}}.0 gives split along axis -1: {REASON}", f"trusted   1 gives whole: {REASON}"]
    for text in (str(sch), str(plan), str(audit(plan))):
        assert [line for line in text.splitlines() if line.startswith("trusted")] == lines


def test_trust_is_no_finding_and_no_change_of_the_layout():
    one, other = plan_build(schedule()), plan_build(schedule().at["0.0"].trust(REASON))
    assert one.steps == other.steps
    assert one.fingerprint != other.fingerprint
    assert audit(one).findings == audit(other).findings


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda s: s.trust(" "), "it is trusted without a reason\n      .trust"),
        (lambda s: s.trust(None), "it is trusted without a reason"),
        (lambda s: s.trust(REASON, gives="parts"), "code does not give 'parts'\n      It gives 'whole', 'split', 'summand'"),
        (lambda s: s.trust(REASON, gives="split"), "gives='split' needs the axis that is split, not None"),
        (lambda s: s.trust(REASON, axis=1), "axis=1 is for what is split, and gives='whole'"),
        (
            lambda s: s.trust(REASON).trust("proven on paper"),
            "0.0: it is trusted twice: gives whole: a kernel of our own, and",
        ),
        (lambda s: s.at["0.0.weight"].trust(REASON), "it selects tensors, and this verb is for modules"),
        (lambda s: s.at["0.9"].trust(REASON), "no module and no tensor has a path like this"),
    ],
)
def test_what_cannot_be_trusted_is_refused(declare, message):
    assert message in problem_of(declare(schedule().at["0.0"]))


def test_the_same_word_twice_is_one():
    assert len(schedule().at["0.0"].trust(REASON).trust(REASON).trusts) == 1


def test_a_function_says_what_it_gives():
    sch = schedule().at["0"].sync("forward_post", join, gives="split", axis=-1)
    (step,) = [step for step in sch.layout if isinstance(step, Sync) and step.op.endswith(":join")]
    assert step.gives == "split"
    assert str(step).endswith(":join(axis=-1, gives=split)@tensor")
    plan = plan_build(sch)
    assert step in loads(dumps(plan)).steps


def test_a_plan_without_a_word_is_written_as_before():
    plan = plan_build(schedule().at["0"].sync("forward_post", join))
    assert '"gives"' not in dumps(plan)
    assert '"trusts"' not in dumps(plan)
    assert not any("gives" in text or name == "trusts" for name, text in plan.canonical_fields.items())


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("all_reduce", {"gives": "whole"}, "gives is said of a function of your own, and what all_reduce gives is known"),
        (join, {"gives": "gathered"}, "code does not give 'gathered'"),
        (join, {"gives": "split"}, "gives='split' needs the axis that is split, not None"),
    ],
)
def test_what_a_sync_cannot_give_is_refused(op, options, message):
    assert message in problem_of(schedule().at["0"].sync("forward_post", op, **options))
