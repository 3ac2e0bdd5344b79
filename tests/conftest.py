"""Settings of the processes that run tests."""

from __future__ import annotations

from tests.helpers.processes import collect_garbage_less_often


def pytest_collection_finish():
    collect_garbage_less_often()
