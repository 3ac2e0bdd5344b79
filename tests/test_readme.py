"""What the README shows is what happens."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest

from shardplan.functional import Schedule
from shardplan.specs import PlanError
from tests.helpers.processes import run_program
from tests.helpers.ranks import run_script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",  # else DeepSpeed prints a warning from every rank, in any order
}


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def test_the_demo_prints_what_the_first_screen_shows():
    shown = blocks("text")[0].split("\n", 1)[1]
    shown_start, shown_losses = shown.split("step  split   alone\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run_program([*torchrun, ROOT / "examples" / "train_llama.py"], folder=ROOT, **ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    out = done.stdout
    start, losses = out.split("step  split   alone\n")
    *_, receipt = start.strip().splitlines()
    *shown_lines, shown_receipt = shown_start.strip().splitlines()
    assert shown_receipt.rpartition(",")[0] == receipt.rpartition(",")[0]  # all but the seconds
    remaining = start.splitlines()
    for line in shown_lines:  # the listing is shortened by lines of dots
        if line.strip() != "...":
            assert line in remaining, line
            remaining = remaining[remaining.index(line) + 1 :]
    rows = [[float(cell) for cell in line.split()] for line in losses.splitlines()]
    shown_rows = [[float(cell) for cell in line.split()] for line in shown_losses.splitlines()]
    assert len(rows) == len(shown_rows) == 10
    for (_, split, alone), (_, shown_split, _) in zip(rows, shown_rows, strict=True):
        assert split == pytest.approx(alone, rel=1e-4)
        assert split == pytest.approx(shown_split, rel=1e-2)
    assert rows[-1][1] < rows[0][1]


def test_the_example_runs_as_it_stands(tmp_path):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    LlamaConfig(**sizes).save_pretrained(tmp_path / "path" / "to" / "llama")
    script = tmp_path / "train.py"
    script.write_text(blocks("python")[1])
    out = run_script(script, 4, tmp_path)
    assert out.splitlines()[-1] == blocks("text")[1].strip()


def test_the_demo_of_a_pipeline_prints_what_is_shown(tmp_path):
    shown = [line for line in blocks("text")[4].splitlines()[1:] if line != "..."]
    out = run_script(ROOT / "examples" / "train_llama.py", 4, tmp_path, PIPE="2", TENSOR="2")
    lines = out.splitlines()
    assert [line for line in lines if line in shown] == shown
    rows = [[float(cell) for cell in line.split()] for line in out.split("step  split   alone\n")[1].splitlines()]
    assert len(rows) == 10
    assert all(split == pytest.approx(alone, rel=1e-4) for _, split, alone in rows)


def test_what_the_page_on_pipelines_prints(capsys, tmp_path):
    page = (ROOT / "docs" / "pipelines.md").read_text()
    code, printed, script, result = re.findall(r"^```(?:python|text)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    exec(code, {"__name__": "page"})
    assert capsys.readouterr().out == printed
    (tmp_path / "train.py").write_text(script)
    assert run_script(tmp_path / "train.py", 2, tmp_path) == result


@pytest.mark.parametrize(("name", "num_ranks"), [("training", 4), ("peft", 2)])
def test_what_a_page_on_training_prints(tmp_path, name, num_ranks):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    script, result = re.findall(r"^```(?:python|text)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    assert run_script(tmp_path / "train.py", num_ranks, tmp_path) == result


def test_the_errors_read_as_they_are_shown():
    names = {}
    exec("from shardplan.functional import create_schedule, plan_build; from shardplan.specs import Mesh", names)
    with pytest.raises(PlanError) as caught:
        exec(blocks("python")[2], names)
    assert f"PlanError: {caught.value}" == blocks("text")[2].strip()


def test_a_wrong_softmax_is_named_as_it_is_shown(capsys):
    names = {}
    exec("import torch; from torch import nn; from shardplan.specs import Mesh", names)
    exec("from shardplan.functional import create_schedule, verify", names)
    exec(blocks("python")[3], names)
    assert capsys.readouterr().out == blocks("text")[3]


def test_every_verb_is_in_the_table():
    verbs = {name for name, value in vars(Schedule).items() if inspect.isfunction(value) and not name.startswith("_")}
    named = set(re.findall(r"^\| `\.(\w+)\(", README, flags=re.MULTILINE))
    assert named == verbs


def test_python_blocks_fit_a_screen():
    for block in blocks("python"):
        assert all(len(line) <= 140 for line in textwrap.dedent(block).splitlines())


PAGES = ("architecture", "init-programs", "layouts", "frontends", "audit", "checkpoints", "types", "verify")


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_prints(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    shown = re.findall(r"^```(?:python|text)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    names = {"__name__": "page"}
    for code, printed in zip(shown[::2], shown[1::2], strict=True):
        exec(code, names)
        assert capsys.readouterr().out == printed
