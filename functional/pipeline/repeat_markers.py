"""Repeated modules, exported once: a module that is like one before, and is called alike, does what that one did.

While the model is exported, the first of a family runs between two markers. For the next ones one placeholder stands in the
graph; ``functional/pipeline/written_out.py`` puts the first one's operations in the place of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import Factory, define
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from ..model.repeated_layers import Call, Families, First
from .opaque_calls import stand_ins


@torch.library.custom_op("shardplan::marker", mutates_args=())
def marker(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    """Stand where the first of a family begins or ends; it never runs."""
    msg = "a marker of an export was run"
    raise AssertionError(msg)


@torch.library.custom_op("shardplan::repeat", mutates_args=())
def repeat(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    """Stand for a module that does what the first of its family did; it never runs."""
    msg = "a placeholder of an export was run"
    raise AssertionError(msg)


_SHAPES: dict[int, Sequence[Tensor]] = {}
"""What the placeholder that runs now will give, by its number."""


marker.register_fake(lambda tensors, number: stand_ins(tensors))  # noqa: ARG005  its schema
repeat.register_fake(lambda tensors, number: stand_ins(_SHAPES[number]))  # noqa: ARG005  its schema


@define
class Repeats(Families):
    """The families of one export.

    Args:
        repeated: For each placeholder, by number, the module that it stands for and the first of its family.
        marks: Numbers of the markers where the first of each family begins and ends.
        num_markers: Markers so far.
    """

    repeated: list[tuple[str, First]] = Factory(list)
    marks: dict[First, tuple[int, int]] = Factory(dict)
    num_markers: int = 0

    def first(self, call: Call, leaves: list[Any], spec: TreeSpec) -> Any:
        """Run the first of a family between two markers."""
        begin, inside = self._mark(leaves)
        returned, first = self.run(call, *tree_unflatten(inside, spec))
        if first is None:
            return returned
        end, marked = self._mark(first.given)
        self.firsts.setdefault(call.key, []).append(first)
        self.marks[first] = begin, end
        return tree_unflatten(marked, first.spec)

    def repeat(self, call: Call, first: First, leaves: list[Any], spec: TreeSpec) -> Any:  # noqa: ARG002  see Families
        """Put a placeholder where one would have run that is like the first."""
        number = len(self.repeated)
        self.repeated.append((call.path, first))
        self.count(call.path, first)
        _SHAPES[number] = [leaf for leaf in first.given if isinstance(leaf, Tensor)]
        try:
            outputs = repeat([leaf for leaf in leaves if isinstance(leaf, Tensor)], number)
        finally:
            del _SHAPES[number]
        return tree_unflatten(_with(first.given, outputs), first.spec)

    def _mark(self, leaves: Sequence[Any]) -> tuple[int, list[Any]]:
        number, self.num_markers = self.num_markers, self.num_markers + 1
        return number, _with(leaves, marker([leaf for leaf in leaves if isinstance(leaf, Tensor)], number))


def _with(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return leaves with other tensors."""
    found = iter(tensors)
    return [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
