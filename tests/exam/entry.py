"""Entries of the exam: layouts that are wrong, or planted faults, and near misses that are right."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

ENTRIES = {}
"""All entries by name, in the order in which they are declared."""


@frozen
class Entry:
    """A schedule that is known to be right or wrong.

    Args:
        name: What it does, in a few words of the field.
        make: Returns the schedule and the inputs of its model: tensors by argument name, all data ranks along axis 0.
        is_right: Whether it computes what the whole model computes.
        where: Path of the module where the difference begins; for a gradient, of the tensor or module whose gradient is the
            first wrong one in the backward pass. None for right entries.
        report: The public report that it is named after, such as ``Megatron-LM#7452``; ``own`` for none.
    """

    name: str
    make: Callable
    is_right: bool
    where: str | None = None
    report: str = "own"


def wrong(name, *, where, report="own"):
    """Register a wrong schedule: ``make`` is the decorated function."""
    return _register(name, is_right=False, where=where, report=report)


def right(name, *, report="own"):
    """Register a right schedule: ``make`` is the decorated function."""
    return _register(name, is_right=True, where=None, report=report)


def _register(name, *, is_right, where, report):
    def register(make):
        assert name not in ENTRIES, f"two entries are named {name!r}"
        ENTRIES[name] = Entry(name, make, is_right, where, report)
        return make

    return register
