"""A mesh axis is added by one line in one table."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest

from shardplan.specs import MESH_AXES
from shardplan.specs.mesh import AXIS_NAMES
from tests.helpers.processes import run_python

ROOT = Path(__file__).parent.parent.parent
LINE = "    context: int = _axis()\n"


def test_a_line_in_the_table_of_mesh_axes_is_all_that_a_new_one_needs(tmp_path):
    for folder in ("functional", "specs"):
        shutil.copytree(ROOT / folder, tmp_path / "shardplan" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "shardplan" / "specs" / "mesh.py"
    lines = table.read_text().splitlines(keepends=True)
    [data] = [number for number, line in enumerate(lines) if line.startswith("    data: int = _axis(")]
    table.write_text("".join([*lines[: data + 1], LINE, *lines[data + 1 :]]))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    shown = run_python("from tests.helpers.added_axis import main; main()", PYTHONPATH=path)
    assert "mesh pipe=1 data=2 context=2 tensor=1" in shown.splitlines()
    assert "context" not in MESH_AXES


OWN_AXES = {
    "functional/dialects/deepspeed/checks.py": "DeepSpeed's own topology",
    "functional/dialects/deepspeed/dialect.py": "DeepSpeed's own topology",
    "functional/dialects/deepspeed/wrap.py": "DeepSpeed's own topology",
}
"""Files that list mesh axes which another library knows."""


def listed_axes(path):
    """Lines of a file that list several mesh axes by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            named = {text.value for text in ast.walk(node) if isinstance(text, ast.Constant) and text.value in AXIS_NAMES}
            if len(named) > 1:
                yield node.lineno


@pytest.mark.parametrize("folder", ["functional", "specs"])
def test_no_file_keeps_a_list_of_mesh_axes(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    found = {str(path.relative_to(ROOT)): [*listed_axes(path)] for path in files}
    assert {name: lines for name, lines in found.items() if lines and name not in OWN_AXES} == {}
