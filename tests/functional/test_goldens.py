"""Goldens of plans: by the function alone, and as pytest runs it in a project of a user's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from shardplan.functional import assert_plan_matches, plan_build
from shardplan.functional.saving.atomic import write_whole
from shardplan.specs import Mesh
from tests.helpers.models import plain, split_plain
from tests.helpers.processes import run_program

PROJECT = """
from shardplan.functional import assert_plan_matches
from shardplan.specs import Mesh, ParamSpec, Plan, Shard, SpecTree

def plan(num, seed=0):
    layers = (ParamSpec(f"layers.{i}.weight", (32, 8), "float32", shards=(Shard(0),)) for i in range(3))
    return Plan(Mesh(tensor=num), SpecTree([*layers, ParamSpec("bias", (8,), "float32")]), steps=(), seed=seed)

def test_two():
    assert_plan_matches(plan(2), "golden/two.txt")

def test_four():
    assert_plan_matches(plan(4, seed=7), "golden/four.txt")
"""
TWO = """\
mesh pipe=1 data=1 tensor=2
stage 0  layers.{0..2}.weight  f32[32@tensor, 8]  not planned  512 B/rank
stage 0  bias                  f32[8]             not planned  32 B/rank
"""


PLUGINS = ("-p", "xdist", "-p", "shardplan")
"""By the names of their entry points."""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_plan.py").write_text(PROJECT)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def pytest_in(folder, *arguments, plugins=PLUGINS):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins, *arguments]
    done = run_program(command, folder=folder, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # other plugins take long to load
    return done.returncode, done.stdout


def test_goldens_are_written_compared_and_written_again(project):
    golden = project / "tests" / "golden"
    code, said = pytest_in(project)
    assert code == 1
    assert "AssertionError: the golden tests/golden/two.txt is missing; pytest --update-goldens writes it:" in said
    assert re.search(r"^E +stage 0  layers\.\{0\.\.2\}\.weight  f32\[32@tensor, 8\]", said, flags=re.MULTILINE)
    assert not golden.exists()

    code, said = pytest_in(project, "--update-goldens", "-n", "2")
    assert code == 0, said
    assert "wrote tests/golden/four.txt\nwrote tests/golden/two.txt\n2 written; read them before" in said
    assert (golden / "two.txt").read_text() == TWO
    assert sorted(path.name for path in golden.iterdir()) == ["four.txt", "two.txt"]

    (golden / "two.txt").write_text(TWO.replace("32@tensor, 8]", "32, 8]       "))
    code, said = pytest_in(project)
    assert code == 1
    assert "1 failed, 1 passed" in said
    lines = [line.removeprefix("E").strip() for line in said.splitlines() if line.startswith("E")]
    assert lines[0] == "AssertionError: the plan is not what tests/golden/two.txt shows"
    assert "-stage 0  layers.{0..2}.weight  f32[32, 8]         not planned  512 B/rank" in lines
    assert "+stage 0  layers.{0..2}.weight  f32[32@tensor, 8]  not planned  512 B/rank" in lines
    assert lines[-1] == "If that is meant: pytest --update-goldens"

    code, said = pytest_in(project, "--update-goldens")
    assert code == 0
    assert "wrote tests/golden/two.txt\n1 written" in said
    code, said = pytest_in(project, plugins=())
    assert code == 0, said
    code, said = pytest_in(project, "--update-goldens", plugins=())
    assert code == 4, "the option is the plugin's"


def test_without_the_plugin_nothing_is_ever_written(tmp_path):
    plan = plan_build(split_plain(plain(), Mesh(tensor=2)))
    missing = tmp_path / "golden" / "plan.txt"
    with pytest.raises(
        AssertionError, match=r"plan\.txt is missing; pytest --update-goldens writes it:\nmesh pipe=1 data=1"
    ):
        assert_plan_matches(plan, missing)
    assert not missing.parent.exists()
    with pytest.raises(
        TypeError, match=r"a golden is of a plan, not of a Mesh: assert_plan_matches\(plan_build\(schedule\), "
    ):
        assert_plan_matches(plan.mesh, missing)


def test_a_golden_changes_with_what_it_shows_and_with_nothing_else(tmp_path):
    model = plain()
    golden = tmp_path / "plan.txt"
    plan = plan_build(split_plain(model, Mesh(tensor=2)))
    write_whole(golden, "\n".join(str(plan).splitlines()[1:]) + "\n")
    assert_plan_matches(plan, golden)
    assert_plan_matches(plan_build(split_plain(model, Mesh(tensor=2)), seed=3), golden)
    with pytest.raises(AssertionError, match="-mesh pipe=1 data=1 tensor=2\n"):
        assert_plan_matches(plan_build(split_plain(model, Mesh(tensor=4))), golden)
    with pytest.raises(AssertionError, match=r"\+mesh pipe=1 data=1 tensor=2  target=torch\n"):
        assert_plan_matches(plan_build(split_plain(model, Mesh(tensor=2)), target="torch"), golden)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "golden.txt"
    write_whole(file, "before\n")
    assert file.stat().st_mode & 0o777 == 0o666 & ~int(run_program(["sh", "-c", "umask"]).stdout, 8)
    file.chmod(0o640)
    write_whole(file, "after\n")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("after\n", 0o640)
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "half\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("golden.txt", "after\n")]


def interrupted(*arguments):
    raise KeyboardInterrupt
