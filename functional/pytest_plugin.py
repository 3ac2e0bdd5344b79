"""The pytest plugin: ``pytest --update-goldens`` writes the files that ``assert_plan_matches`` compares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .goldens import Updates


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-goldens``."""
    group = parser.getgroup("shardplan")
    group.addoption("--update-goldens", action="store_true", help="write the goldens of plans instead of comparing them")


def pytest_configure(config: pytest.Config) -> None:
    """Switch writing on."""
    if config.getoption("--update-goldens"):
        _updates().are_on = True


def pytest_unconfigure(config: pytest.Config) -> None:
    """Switch writing off, for a process that runs pytest twice."""
    if config.getoption("--update-goldens"):
        _updates().are_on = False
        _updates().written.clear()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass the files that a worker of pytest-xdist wrote to the reporting process."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None and session.config.getoption("--update-goldens"):
        output["shardplan_goldens"] = [str(path) for path in _updates().written]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the files that a worker of pytest-xdist wrote."""
    written = getattr(node, "workeroutput", {}).get("shardplan_goldens")
    if written:
        _updates().written += map(Path, written)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the goldens that were written."""
    if not config.getoption("--update-goldens"):
        return
    written = sorted({os.path.relpath(path) for path in _updates().written})
    terminalreporter.section("goldens")
    for path in written:
        terminalreporter.line(f"wrote {path}")
    terminalreporter.line(f"{len(written)} written; read them before they are committed")


def _updates() -> Updates:
    from .goldens import UPDATES  # only where goldens are written: every pytest of this environment loads the plugin

    return UPDATES
