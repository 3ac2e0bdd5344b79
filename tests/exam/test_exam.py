"""``verify`` is right on every entry of the exam, and its page tells what is."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.exam.__main__ import page
from tests.exam.judge import all_entries, judge

PAGE = Path(__file__).parents[2] / "docs" / "exam.md"


@cache
def judgements():
    return [judge(entry) for entry in all_entries()]


def test_verify_tells_wrong_entries_from_right_ones():
    misjudged = [f"{j.entry.name}: {j.verified}" for j in judgements() if not j.is_judged_right]
    assert not misjudged


NOT_FOLLOWED = {
    "a sum by a function that loses the gradient",
    "a maximum over ranks in place of a sum",
    "a sum that the second rank does not join",
    "a sum by an autograd function whose gradient is summed too",
    "a sum by an autograd function whose gradient is divided by the ranks",
    "a gather of the user's own that begins with each rank's own part",
    "experts over data ranks, their sum divided by the local number of experts",
    "features that heads share, written into the first head alone",
}
"""Wrong entries that planning does not refuse, and does not prove: code of the user's own of which nobody says what it gives
(functions that synchronise, experts), and memory of local sizes at some places of which all ranks write the same."""


def test_planning_refuses_wrong_entries_and_proves_right_ones():
    expected = {True: "holds", False: "refused"}
    others = [
        f"{j.entry.name}: {j.planned_with_inputs}"
        for j in judgements()
        if not j.planned_with_inputs.startswith(
            "not followed" if j.entry.name in NOT_FOLLOWED else expected[j.entry.is_right]
        )
    ]
    assert not others


def test_the_page_is_that_of_the_entries():
    assert PAGE.read_text() == page(judgements()), "write it anew: python -m tests.exam --write docs/exam.md"


def test_wrong_entries_name_a_place_and_right_ones_do_not():
    assert all((entry.where is None) == entry.is_right for entry in all_entries())
    assert min(sum(entry.is_right for entry in all_entries()), sum(not entry.is_right for entry in all_entries())) >= 200
