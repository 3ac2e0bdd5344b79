"""Paths of modules and tensors, as ``named_modules`` and ``named_parameters`` spell them."""

from __future__ import annotations


def join(module: str, name: str) -> str:
    """Return the path of a module's own tensor or submodule.

    >>> join("model.norm", "weight"), join("", "weight")
    ('model.norm.weight', 'weight')
    """
    return f"{module}.{name}" if module else name


def module_of(path: str) -> str:
    """Return the path of the module that holds a tensor or submodule; ``""`` is the model itself.

    >>> module_of("model.norm.weight"), module_of("weight")
    ('model.norm', '')
    """
    return path.rpartition(".")[0]


def name_of(path: str) -> str:
    """Return the name under which a module holds a tensor or submodule.

    >>> name_of("model.norm.weight"), name_of("weight")
    ('weight', 'weight')
    """
    return path.rpartition(".")[2]
