"""Plans saved by an earlier shardplan: they load, mean the same, and planning the same model again gives them.

They are in ``tests/golden/plans``: a plan as JSON, and its listing, audit and receipts as text. When the schema of plans
changes, they are written anew: ``pytest --update-goldens tests/functional/test_saved_plans.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shardplan.specs import dumps, loads
from tests.helpers.saved_plans import PLANS, described

FOLDER = Path(__file__).parents[1] / "golden" / "plans"


@pytest.fixture(scope="module", params=PLANS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def planned(name, tmp_path_factory):
    """The same model planned anew; a folder of files that it reads is named relative to the current one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("weights"))
        return PLANS[name]()


@pytest.fixture(scope="module")
def saved(name, planned, pytestconfig):
    file = FOLDER / f"{name}.json"
    if pytestconfig.getoption("update_goldens"):
        file.write_text(dumps(planned))
        file.with_suffix(".txt").write_text(described(planned))
    return loads(file.read_text())


def test_planning_again_gives_the_saved_plan(saved, planned):
    assert planned == saved
    assert planned.fingerprint == saved.fingerprint


def test_a_saved_plan_is_written_as_it_was(name, saved):
    assert dumps(saved) == (FOLDER / f"{name}.json").read_text()


def test_a_saved_plan_means_what_it_meant(name, saved):
    assert described(saved) == (FOLDER / f"{name}.txt").read_text()


def test_every_saved_plan_is_looked_at():
    assert {file.stem for file in FOLDER.glob("*.json")} == {file.stem for file in FOLDER.glob("*.txt")} == {*PLANS}
