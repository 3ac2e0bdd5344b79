"""Pages on how the code is built name files and functions that are there, and show the rooms that there are."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "docs/architecture.md")
LONGEST = 450
"""Lines of a file that a person still reads in one sitting."""


TEXTS = [(ROOT / page).read_text() for page in PAGES]
FILES = {name for text in TEXTS for name in re.findall(r"`((?:functional|specs|tests|docs|benchmarks)/[\w./]+)`", text)}
FUNCTIONS = {name for text in TEXTS for name in re.findall(r"`(functional\.[\w.]+)`", text)}
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS = [
    [room.rpartition(".")[2] for room in layer.split(" | ")]
    for contract in CONTRACTS
    if contract["type"] == "layers"
    for layer in contract["layers"]
]


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_file_that_is_named_is_there(file):
    assert (ROOT / file).exists()


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_that_is_named_is_there(name):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(("shardplan", *parts[:split])))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} leads nowhere")


def test_the_picture_shows_every_room_in_the_order_of_the_layers():
    picture = re.search(r"^```text\n(cli .*?)^```$", TEXTS[0], re.DOTALL | re.MULTILINE)[1]
    assert [re.split(r" {2,}", line)[:-1] for line in picture.splitlines()] == LAYERS


def test_no_room_stands_outside_the_layers():
    files = {path.stem for path in (ROOT / "functional").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / "functional").glob("*/__init__.py")}
    assert files | folders | {"specs"} == {room for layer in LAYERS for room in layer}


def test_every_file_is_read_in_one_sitting():
    files = [path for folder in ("functional", "specs") for path in (ROOT / folder).rglob("*.py")]
    assert {str(path): n for path in files if (n := len(path.read_text().splitlines())) > LONGEST} == {}
