"""Runtimes of other packages."""

from __future__ import annotations

import sys

import pytest

from shardplan.functional import execute, plan_build
from shardplan.specs import PlanError
from tests.models import schedule

OTHER = """
from shardplan.functional.dialects.handover import Wrapped
from shardplan.specs import Problem


class Shouting:
    def check(self, mesh, tree, config):
        return [] if config else [Problem("config", "nothing to shout", "Write a word")]

    def groups(self, mesh):
        return ()

    def wrap(self, handover):
        word = handover.plan.config["word"]
        return Wrapped(model=(word.upper(), handover.module), optimizer=None, extras={"volume": 11})
"""


@pytest.fixture
def shouting(tmp_path, monkeypatch):
    """A package that is installed as packages are: a module and its entry point."""
    (tmp_path / "shouting.py").write_text(OTHER)
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shardplan.dialects]\nshout = shouting:Shouting\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("shouting", None)


@pytest.mark.usefixtures("shouting")
def test_a_dialect_of_another_package_checks_and_wraps():
    with pytest.raises(PlanError, match="config: nothing to shout\n      Write a word"):
        plan_build(schedule("plain"), target="shout")
    plan = plan_build(schedule("plain"), target="shout", config={"word": "hello"})
    built = execute(plan, device="cpu")
    assert built.model == ("HELLO", built.module)
    assert built.extras["volume"] == 11
    with pytest.raises(PlanError, match="There are None, deepspeed, shout; the closest is shout"):
        plan_build(schedule("plain"), target="shoot")
