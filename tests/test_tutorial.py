"""What the tutorial shows is what happens: its files are written, its commands run, its workflow carried out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from shardplan.functional.cli import main
from tests.helpers.processes import run_program

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n\n```(?P<language>\w+)\n(?P<text>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w./]+\.\w+)`")
COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", flags=re.MULTILINE)
OR_ELSE = ' || echo "exit code $?"'
VARIES = re.compile(r"\b[0-9a-f]{12}\b|\d+\.\d+s\b")
"""Fingerprints, which change with the schema, and seconds."""

WIDER = "sed -i.was 's/data=2,tensor=4/tensor=8/' plan.sh && rm plan.sh.was"
"""A change of the plan."""

ENVIRONMENT = {
    "COLUMNS": "80",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONDONTWRITEBYTECODE": "1",  # files change within a second
    "PYTEST_ADDOPTS": "-p no:cacheprovider",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("model", None)


def shell(command, folder, **environment):
    script = ["bash", "-e", "-o", "pipefail", "-c", command]
    done = run_program(script, folder=folder, stderr=subprocess.STDOUT, **{**ENVIRONMENT, **environment})
    return done.returncode, done.stdout


def console(line, folder):
    """Run a line as it is typed; shardplan in this process, which has loaded torch already."""
    command = line.removesuffix(OR_ELSE)
    if command.startswith("shardplan "):
        sys.modules.pop("model", None)
        done = CliRunner().invoke(main, command.split()[1:], prog_name="shardplan")
        code, said = done.exit_code, done.output
    else:
        code, said = shell(command, folder)
    assert (code != 0) == line.endswith(OR_ELSE), said
    return said + (f"exit code {code}\n" if code else "")


def check(shown, said):
    """Hold what is shown against what was said; a line of dots stands for any lines."""
    parts = [re.escape(VARIES.sub("VARIES", part)) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    if not re.fullmatch("(?:.*\n)*?".join(parts), VARIES.sub("VARIES", said)):
        pytest.fail(f"the page shows\n{shown}\nwhere this is printed\n{said}", pytrace=False)


def edit(file, diff):
    """Apply a diff without line numbers."""
    lines = diff.splitlines()
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in ("- ", "+ "))
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def carry_out(workflow, folder, changes):
    """Carry out a workflow's own commands in a repository; ``changes`` lead to its base branch, and to the pull request."""
    job = workflow["jobs"]["plan"]
    assert workflow[True] == "pull_request"  # YAML 1.1 reads "on" so
    assert set(job["env"]) == {"BASE", "NUMBER", "GH_TOKEN", "SHARDPLAN"}
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps[0] == 'pip install "shardplan @ $SHARDPLAN" pytest', "no step takes a name from an index that it is not on"
    assert not any("${{" in step for step in steps), "what others write must not become a command"
    commit = "git add -A && git -c user.name=me -c user.email=me@example.org commit -qm change"
    for command in (
        f"git init -q . && {changes[0]} && {commit} && git update-ref refs/remotes/origin/main HEAD",
        f"{changes[1]} && {commit}",
    ):
        code, said = shell(command, folder)
        assert code == 0, said
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "gh").write_text('#!/bin/sh\necho "$@" > posted.txt\n')
    (folder / "bin" / "gh").chmod(0o755)
    said = ""
    for step in steps[1:]:
        path = f"{folder / 'bin'}{os.pathsep}{ENVIRONMENT['PATH']}"
        code, said = shell(step, folder, BASE="main", NUMBER="7", GH_TOKEN="", PATH=path)
        assert code == 0, said
    return said


def test_the_tutorial(folder, tmp_path_factory):
    blocks = list(BLOCK.finditer(PAGE.read_text()))
    assert len(blocks) == PAGE.read_text().count("\n```") // 2, "a block has no empty line before it"
    printed = {}
    for block in blocks:
        language, text = block["language"], block["text"]
        if language == "console":
            for line, shown in COMMAND.findall(text):
                printed[line] = console(line, folder)
                check(shown, printed[line])
            continue
        file = folder / FILE.findall(block["before"])[-1]
        if language == "diff":
            edit(file, text)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    workflow = yaml.safe_load((folder / ".github" / "workflows" / "plan.yml").read_text())
    first = tmp_path_factory.mktemp("first")
    shutil.copytree(folder, first, dirs_exist_ok=True)
    audited = carry_out(workflow, folder, ("true", WIDER))
    assert audited.startswith("audit of plan ")
    assert "mesh pipe=1 data=1 tensor=8" in audited
    compared = next(said for line, said in printed.items() if line.startswith("shardplan diff"))
    assert (folder / "comment.md").read_text() == f"What this changes on every rank:\n```\n{compared}```\n"
    assert (folder / "posted.txt").read_text() == "pr comment 7 --edit-last --create-if-none --body-file comment.md\n"
    # the pull request that adds plan.sh
    assert "mesh pipe=1 data=2 tensor=4" in carry_out(workflow, first, ("mv plan.sh ../plan.sh", "mv ../plan.sh plan.sh"))
    shown = next(said for line, said in printed.items() if line.startswith("shardplan show"))
    assert (first / "comment.md").read_text() == f"The first plan of this repository:\n```\n{shown}```\n"
