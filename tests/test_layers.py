"""Who may import whom: asked of fresh processes, and of the import contracts, each of which can fail."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from shardplan import functional
from shardplan.functional import plan_build
from shardplan.specs import Mesh, dumps
from tests.helpers.models import plain, split_plain
from tests.helpers.processes import run_program, run_python

ROOT = Path(__file__).parent.parent
CONTRACTS = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
]
OFFENCES = {
    "one way, from the command line to the records": (
        "functional/layout/hooks.py",
        "from ..planning import value_steps",
        "shardplan.functional.layout.hooks -> shardplan.functional.planning.value_steps",
    ),
    "specs know nothing of how": ("specs/__init__.py", "import numpy", "shardplan.specs -> numpy"),
    "audit and interpreter need no torch": (
        "functional/interpreter/dry_run.py",
        "import torch",
        "shardplan.functional.interpreter.dry_run -> torch",
    ),
    "planning has no way to an effect": (
        "functional/frontends/verb_calls.py",
        "from ..interpreter import torch_effects",
        "shardplan.functional.frontends.verb_calls -> shardplan.functional.interpreter.torch_effects",
    ),
    "only build stands on execute": (
        "functional/pytest_plugin.py",
        "from .execute import execute",
        "shardplan.functional.pytest_plugin -> shardplan.functional.execute",
    ),
}
"""For each contract a file, a line that breaks it, and the chain that is then reported."""

PRINT_HEAVY = "print([name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules])"


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for room in ("functional", "specs") for path in (ROOT / room).rglob("__init__.py")]
    assert listed == sorted(".".join(("shardplan", *folder.relative_to(ROOT).parts)) for folder in folders)


def test_specs_import_neither_torch_nor_deepspeed_nor_numpy():
    modules = [f"shardplan.specs.{path.stem}" for path in (ROOT / "specs").glob("*.py") if path.stem != "__init__"]
    assert run_python(f"import sys, shardplan.specs, {', '.join(modules)}\n{PRINT_HEAVY}") == "[]\n"


@pytest.mark.parametrize(
    ("target", "config"),
    [
        (None, None),
        ("torch", {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}),
        ("deepspeed", {"train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}),
    ],
)
def test_a_saved_plan_is_shown_and_audited_without_torch(tmp_path, target, config):
    plan = plan_build(split_plain(plain(), Mesh(data=2, tensor=2)), target=target, config=config)
    saved = tmp_path / "plan.json"
    saved.write_text(dumps(plan))
    code = f"""
import sys
from pathlib import Path
from shardplan.functional import audit, predict
from shardplan.specs import loads
plan = loads(Path(sys.argv[1]).read_text())
print(plan)
print(audit(plan))
print(predict(plan, 3))
{PRINT_HEAVY}
"""
    shown = run_python(code, str(saved))
    assert shown.startswith(str(plan))
    assert "ok      yes" in shown
    assert shown.endswith("[]\n")


def test_importing_the_package_loads_no_torch():
    assert run_python(f"import sys, shardplan.functional\n{PRINT_HEAVY}") == "[]\n"


def test_a_function_is_not_hidden_by_the_file_of_its_name():
    names = sorted({path.stem for path in (ROOT / "functional").glob("*.py")} & {*functional.__all__})
    assert names == ["audit", "build", "diff", "execute", "search", "verify"]
    code = "import sys\nimport shardplan.functional as functional\n" + "".join(
        f"""
import shardplan.functional.{name}
from shardplan.functional import {name}
import shardplan.functional.{name}
module = sys.modules["shardplan.functional.{name}"]
print("{name}", {name} is functional.{name} is module.{name}, callable({name}))
"""
        for name in names
    )
    assert run_python(code).splitlines() == [f"{name} True True" for name in names]


@pytest.mark.parametrize("name", functional.__all__)
def test_a_public_name_leads_to_something_to_call(name):
    assert callable(getattr(functional, name))
    assert name in dir(functional)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'shardplan\.functional' has no attribute 'executed'"):
        _ = functional.executed


def named_runtimes(path):
    """Lines of a file that compare something with a runtime's name, or match it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        elif isinstance(node, ast.Dict):
            operands = [key for key in node.keys if key is not None]
        else:
            continue
        texts = (text for operand in operands for text in ast.walk(operand) if isinstance(text, ast.Constant))
        if any(text.value in RUNTIMES for text in texts):
            yield node.lineno if hasattr(node, "lineno") else 0


RUNTIMES = ("deepspeed", "torch")


def outside_dialects():
    files = [*(ROOT / "specs").rglob("*.py"), *(ROOT / "functional").rglob("*.py")]
    return [path for path in files if ROOT / "functional" / "dialects" not in path.parents]


def test_nothing_outside_dialects_asks_for_a_runtime_by_name():
    assert [(path.name, line) for path in outside_dialects() for line in named_runtimes(path)] == []


@pytest.mark.parametrize(
    "line", ["x = plan.target == 'deepspeed'", "x = target in ('torch', None)", "x = {'torch': 1}[plan.target]"]
)
def test_a_question_by_name_is_seen(tmp_path, line):
    (tmp_path / "asks.py").write_text(line)
    assert list(named_runtimes(tmp_path / "asks.py")) == [1]


def test_runtimes_are_imported_by_their_own_folders_alone():
    imported = {path.name for path in outside_dialects() if re.search(r"dialects\.(deepspeed|torch)\b", path.read_text())}
    assert imported == set()
    users = {
        path
        for path in (ROOT / "functional").rglob("*.py")
        if re.search(r"^\s*(import|from) deepspeed\b", path.read_text(), re.MULTILINE)
    }
    assert {path.parent.name for path in users} == {"deepspeed"}


@pytest.fixture
def copy(tmp_path):
    """The packages under their import names, with the contracts, where a line can be added."""
    for folder in ("functional", "specs"):
        shutil.copytree(ROOT / folder, tmp_path / "shardplan" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    """Return the exit status of import-linter and what it says."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = run_program(command, folder=folder, PYTHONPATH=str(folder))
    return done.returncode, done.stdout


def test_all_contracts_are_kept():
    status, said = lint(ROOT)
    assert status == 0, said
    assert all(f"{name} KEPT" in said for name in CONTRACTS)


def test_all_contracts_are_kept_by_a_copy(copy):
    status, said = lint(copy)
    assert status == 0, said
    assert all(f"{name} KEPT" in said for name in CONTRACTS)


def test_every_contract_has_its_offence():
    assert sorted(OFFENCES) == sorted(CONTRACTS)


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_contract_can_fail(copy, name):
    file, line, chain = OFFENCES[name]
    with (copy / "shardplan" / file).open("a") as text:
        text.write(f"\n{line}\n")
    status, said = lint(copy)
    assert status == 1
    assert [other for other in CONTRACTS if f"{other} BROKEN" in said] == [name]
    assert chain in " ".join(said.split())


EFFECTFUL = {
    "functional/built.py",
    "functional/dialects/deepspeed/wrap.py",
    "functional/dialects/gradient_norm.py",
    "functional/dialects/torch/wrap.py",
    "functional/guards/batches.py",
    "functional/guards/draws.py",
    "functional/guards/steps.py",
    "functional/guards/watch.py",
    "functional/guards/wrappers.py",
    "functional/interpreter/torch_effects.py",
    "functional/interpreter/torch_loading.py",
    "functional/interpreter/world.py",
    "functional/judging/groups.py",
    "functional/layout/collectives.py",
    "functional/layout/device_mesh.py",
    "functional/layout/dtensor.py",
    "functional/saving/dcp.py",
    "functional/saving/gather.py",
    "functional/saving/messages.py",
    "functional/saving/transfer.py",
}
"""The layers that carry a plan out, wrap a module, watch it, save, or run ranks as threads; ``layout`` makes operators,
hooks and DTensors, for later."""


def imports_distributed(path):
    tree = ast.parse(path.read_text())
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(name.startswith("torch.distributed") for name in named)


def test_only_the_effectful_side_imports_torch_distributed():
    files = [*(ROOT / "specs").rglob("*.py"), *(ROOT / "functional").rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in files if imports_distributed(path)} == EFFECTFUL
