"""What a comparison of all ranks with the whole model found."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Literal

from attrs import field, frozen

from .errors import Problem
from .mesh import Mesh

DifferenceKind = Literal[
    "error", "hang", "collective", "shape", "output", "loss", "gradient", "replica", "weight", "buffer", "dropout"
]
"""What differs: a rank raises an error, waits in vain, or issues another collective; an output has another shape or other
values; the loss, a gradient, a weight after a step, or a buffer has other values; replicas have different values; or dropout
masks are equal where they should differ, or differ where they should be equal."""

_MAX_SHOWN = 8


@frozen
class Difference:
    """A difference between ranks and the whole model.

    Args:
        kind: What differs.
        path: Path of the module or tensor; ``""`` for the whole model.
        cause: The difference in words.
        relative: Norm of the difference over the norm of the whole model's tensor (0.12 is 12 %); None where there is
            none, or it is not finite.
        ranks: The ranks that differ.
    """

    kind: DifferenceKind
    path: str
    cause: str
    relative: float | None = field(default=None, converter=lambda size: None if size is None or not isfinite(size) else size)
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.path or 'the model'}: {self.cause}"


@frozen
class Comparison:
    """All ranks of a mesh beside the whole model.

    Args:
        mesh: The ranks.
        tolerance: The relative difference up to which values are equal.
        differences: Everything that differs, by kind, then in order of execution; gradients in that of the backward pass.
        first: Where it begins: the first module whose output differs though its inputs agree, or the first gradient.
        refused: Why ``plan_build`` refuses the schedule with these inputs; empty if it plans it.
        notes: What could not be compared, and from what the tolerance comes.
        num_tensors: Number of parameters and buffers that were compared.
        num_modules: Number of modules whose outputs could be compared.
    """

    mesh: Mesh
    tolerance: float
    differences: tuple[Difference, ...] = ()
    first: Difference | None = None
    refused: tuple[Problem, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    num_tensors: int = 0
    num_modules: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        many = self.mesh.num_ranks
        ranks = f"{many} rank{'s' if many > 1 else ''} ({self.mesh}) beside the whole model"
        compared = f"{self.num_tensors} tensors and the outputs of {self.num_modules} modules compared"
        verdict = "the same" if self.ok else "DIFFERENT"
        yield f"{ranks}: {verdict} ({compared}, tolerance {self.tolerance:.0e})"
        if self.first is not None:
            yield f"  begins at {self.first}"
        for kind in dict.fromkeys(difference.kind for difference in self.differences):
            found = [difference for difference in self.differences if difference.kind == kind]
            yield f"  {kind}s: {len(found)}" if len(found) > 1 else f"  {kind}: 1"
            yield from (f"    {difference}" for difference in found[:_MAX_SHOWN])
            if len(found) > _MAX_SHOWN:
                yield f"    ... {len(found) - _MAX_SHOWN} more"
        yield from (f"  plan_build refuses it: {problem}" for problem in self.refused)
        yield from (f"  {note}" for note in self.notes)


def percent(relative_difference: float) -> str:
    """Return a relative difference in words, with two digits.

    >>> percent(1.234), percent(0.1234), percent(3e-5), percent(float("inf"))
    ('120 %', '12 %', '0.003 %', 'more than everything')
    """
    if relative_difference == float("inf"):
        return "more than everything"
    return f"{float(f'{100 * relative_difference:.2g}'):g} %"
