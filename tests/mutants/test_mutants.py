"""The mutants are drawn alike each time, the judge is right about those that were computed by hand, and all are counted."""

from __future__ import annotations

import random

import pytest
from attrs import evolve

from shardplan.functional import create_schedule, verify
from shardplan.specs import Mesh, Shard
from shardplan.specs.layout_steps import ForkRng, SetAttributes, SumGradient, Sync
from tests.mutants import modules
from tests.mutants.draw import draw, schedule
from tests.mutants.edits import KINDS
from tests.mutants.judge import Outcome, is_near, judge, measure, refusal, unjudged
from tests.mutants.page import COLUMNS, by_kind, page
from tests.mutants.run import run_all
from tests.mutants.subjects import SUBJECTS

NUM = 40


@pytest.fixture(scope="module")
def outcomes():
    return [judge(mutant) for mutant in draw(NUM, seed=1)]


def test_sample_covers_kinds_and_subjects_and_every_mutant_is_counted_once(outcomes):
    assert {outcome.kind for outcome in outcomes} == set(KINDS)
    assert {outcome.subject for outcome in outcomes} == set(map(str, SUBJECTS))
    assert {outcome.cell for outcome in outcomes} <= set(COLUMNS)
    last = by_kind(outcomes).splitlines()[-1]
    counts = [int(cell or 0) for cell in map(str.strip, last.split("|")[2:-1])]
    assert counts[0] == sum(counts[1:]) == NUM


def test_sample_has_wrong_and_right_mutants_and_each_was_judged(outcomes):
    verdicts = [outcome.verdict for outcome in outcomes]
    assert verdicts.count("wrong") > NUM // 3
    assert verdicts.count("right") > NUM // 20
    assert [outcome for outcome in outcomes if outcome.verdict == "unknown"] == []
    assert all(outcome.reason for outcome in outcomes if outcome.verdict == "wrong")


def test_judging_again_gives_the_same(outcomes):
    again = [judge(mutant) for mutant in draw(6, seed=1)]
    assert [outcome_without_numbers(outcome) for outcome in again] == [outcome_without_numbers(o) for o in outcomes[:6]]


def outcome_without_numbers(outcome):
    return evolve(outcome, reason=outcome.reason.partition(":")[0])


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_unchanged_schedule_is_right(subject):
    assert refusal(schedule(subject), subject.inputs()) == ("", ())
    assert measure(schedule(subject), subject.inputs()) == ("right", "", False, ())


def test_same_seed_same_mutants_and_more_begin_with_fewer():
    few, many, others = draw(50, seed=3), draw(90, seed=3), draw(50, seed=4)
    assert [m.mutation.description for m in few] == [m.mutation.description for m in many][:50]
    assert [m.mutation.description for m in few] != [m.mutation.description for m in others]
    assert len({(str(m.subject), m.mutation.schedule.tree.specs, m.mutation.schedule.layout) for m in many}) == 90


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_a_schedule_and_says_where(kind):
    rng = random.Random(0)
    found = [m for subject in SUBJECTS for _ in range(4) if (m := KINDS[kind](schedule(subject), rng))]
    assert found
    for mutation in found:
        known = {*mutation.schedule.tree.all_paths, *(module.path for module in mutation.schedule.modules)}
        assert set(mutation.places) <= known
        assert not mutation.schedule.problems  # as if it had been declared so


ENCODER = modules.encoder(Mesh(tensor=2), p=0.5)
IDS = next(subject for subject in SUBJECTS if subject.name == "encoder, dropout, by hand").inputs()
"""Both are as in the table: q, k and v in blocks, dropout on split heads and split hidden features."""


def without(sch, *steps):
    assert set(steps) <= set(sch.layout)
    return evolve(sch, layout=tuple(step for step in sch.layout if step not in steps))


def with_split(sch, path, *shards):
    return evolve(sch, tree=sch.tree.replace({path: evolve(sch.tree[path], shards=shards)}))


ALL_REDUCE = Sync("layers.0.feed.up", "backward_post", "all_reduce")

WRONG = {
    "gradients of all that comes before are those of half the features": (
        without(ENCODER, ALL_REDUCE),
        "gradient",
    ),
    "each rank has half the sum": (without(ENCODER, Sync("layers.1.feed.down", "forward_post", "all_reduce")), "output"),
    "the sum is counted twice": (
        evolve(ENCODER, layout=(*ENCODER.layout, Sync("layers.1.attention.out", "forward_post", "all_reduce"))),
        "output",
    ),
    "query features meet those of keys": (
        with_split(with_split(ENCODER, "layers.0.attention.qkv.weight", Shard(0)), "layers.0.attention.qkv.bias", Shard(0)),
        "output",
    ),
    "ranks drop the same of different heads": (without(ENCODER, ForkRng("layers.0.attention.dropout")), "dropout"),
    "ranks drop different ones of the same activations": (
        evolve(ENCODER, layout=(*ENCODER.layout, ForkRng("layers.0.dropout"))),
        "dropout",
    ),
    "a gradient that is whole on each rank is summed": (
        evolve(ENCODER, layout=(*ENCODER.layout, SumGradient("norm", "weight"))),
        "gradient",
    ),
}

SPLIT = modules.sequence(Mesh(tensor=2))

RIGHT = {
    "a linear module does not read its number of features": without(
        ENCODER, SetAttributes("layers.0.feed.up", {"out_features": 12})
    ),
    "the last of three axes has two numbers": evolve(
        ENCODER, layout=tuple(evolve(s, axis=2) if isinstance(s, Sync) and s.axis == -1 else s for s in ENCODER.layout)
    ),
    "features of columns and rows are ordered alike": with_split(
        with_split(
            with_split(ENCODER, "layers.0.feed.up.weight", Shard(0, blocks=(12, 12))),
            "layers.0.feed.up.bias",
            Shard(0, blocks=(12, 12)),
        ),
        "layers.0.feed.down.weight",
        Shard(1, blocks=(12, 12)),
    ),
    "a sum of a gradient that is declared twice is one": evolve(SPLIT, layout=(*SPLIT.layout, SumGradient("norm", "bias"))),
}


@pytest.mark.parametrize("why", WRONG)
def test_judge_is_right_about_what_is_wrong(why):
    sch, kind = WRONG[why]
    comparison = verify(sch, IDS)
    assert not comparison.ok
    assert kind in {difference.kind for difference in comparison.differences}


@pytest.mark.parametrize("why", RIGHT)
def test_judge_is_right_about_what_does_not_matter(why):
    assert measure(RIGHT[why], {"ids": IDS["ids"][:, :4]}) == ("right", "", False, ())


def test_a_split_that_does_not_divide_is_wrong():
    verdict, reason, is_loud, paths = measure(with_split(ENCODER, "norm.weight", Shard(0, granule=3)), IDS)
    assert (verdict, is_loud) == ("wrong", True)
    assert reason.startswith("layout norm.weight: axis 0 has 16 entries")
    assert paths == ("norm.weight",)


def test_refusals_name_what_is_near():
    tree = create_schedule(modules.Encoder(), Mesh()).tree
    place = "layers.0.attention.qkv"
    near = {place, f"{place}.weight", "layers.0.attention", "layers.0.attention.out", "layers.0"}
    far = {"", "head", "layers", "layers.1", "layers.1.attention.qkv", "layers.0.feed", "layers.0.norm.weight"}
    assert {path for path in near | far if is_near(path, place, tree)} == near
    assert {path for path in near | far if is_near(path, f"{place}.bias", tree)} == near
    assert is_near("layers.0.feed", "layers.0.attention", tree)
    assert is_near("layers.0.attention.out", "layers.0", tree)
    assert not is_near("layers.1", "layers.0", tree)
    assert is_near("head.weight", "head", tree)
    assert not is_near("embed.weight", "head", tree)
    assert is_near("embed.weight", "head", create_schedule(modules.Encoder(is_tied=True), Mesh()).tree)
    assert is_near("", "", tree)
    assert is_near("layers.*.feed", "layers.1.feed.up", tree)
    assert not is_near("layers.*.feed", "head", tree)


def test_processes_that_end_or_hang_give_an_unjudged_mutant(monkeypatch):
    import os
    import time

    monkeypatch.setattr("tests.mutants.run.LIMIT_S", 0.5)

    def work(item):
        if item == "ends":
            os._exit(3)
        time.sleep(60 if item == "hangs" else 0)
        return item.upper()

    found = run_all(work, ["a", "ends", "b", "hangs", "c"], 2, lambda item, cause: f"{item}: {cause}")
    assert found == ["A", "ends: its process ended with 3", "B", "hangs: it took more than 0.5 s", "C"]


def test_page_is_the_same_for_the_same_outcomes_and_lists_what_was_not_judged():
    mutant = draw(1, seed=0)[0]
    late = unjudged(mutant, "it took more than 180 s")
    passed = Outcome(
        1, late.kind, late.subject, "a change", "wrong", "output layers.0: it differs", False, None, "", (), False
    )
    text = page([late, passed], 2, 0)
    assert text == page([late, passed], 2, 0)
    assert f"| {late.kind} | 2 | 1 |  |  |  |  |  |  | 1 |" in text
    assert "Of 1 wrong mutants 1 are accepted: 100 %. 1 of these are silent" in text
    assert "it took more than 180 s" in text
