"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest


def names(package):
    """The package and every module in it, by import; a function of a module's name cannot hide it."""
    paths = import_module(package).__path__
    return [package, *(module.name for module in pkgutil.walk_packages(paths, f"{package}."))]


MODULES = [*names("shardplan.specs"), *names("shardplan.functional")]


def test_modules_are_found_in_folders_too():
    assert {"shardplan.specs.mesh", "shardplan.functional.execute", "shardplan.functional.dialects.deepspeed.dialect"} <= {
        *MODULES
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    assert doctest.testmod(import_module(name)).failed == 0
