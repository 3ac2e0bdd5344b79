"""Random masks: equal on ranks that hold the same values, and different on ranks that hold different parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch

from ...specs.comparison import Difference
from ...specs.mesh import Coordinate, Mesh
from ...specs.plan import Plan
from .exact import Draw
from .ranks import RankRun
from .whole import WholeRuns


def different_masks(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], notes: list[str]) -> Iterator[Difference]:
    """Iterate over modules whose random masks are equal where ranks hold other parts, or differ where they hold the same."""
    has_modules = plan.pipeline is None  # the graphs of stages have none
    for group in _replicas_of_batches(plan.mesh):
        expected = _numbered(whole.runs[group[0][0].index("data")].draws, by_module=has_modules)
        drawn = [
            _numbered([draw for here in places for draw in ranks[here.rank].run.masks], by_module=has_modules)
            for places in group
        ]
        everyone = tuple(here.rank for places in group for here in places)
        for key, wanted in expected.items():
            masks = [own[key] for own in drawn if key in own]
            if len(masks) < len(drawn):
                notes.append(f"random numbers of {key[0] or 'the model'} ({key[1]}) could not be compared")
                continue
            values: list[Any] = [mask.values for mask in masks]
            is_equal = [one.shape == other.shape and torch.equal(one, other) for one, other in combinations(values, 2)]
            is_whole = all(mask.shape == wanted.shape for mask in masks)
            if is_whole and not all(is_equal):
                cause = f"ranks draw different random numbers ({key[1]}) where they hold the same values"
            elif not is_whole and any(is_equal) and all(value.unique().numel() > 1 for value in values):
                cause = f"ranks draw the same random numbers ({key[1]}) where they hold different parts"
            else:
                continue
            yield Difference("dropout", wanted.module, cause, None, everyone)


def _numbered(draws: Iterable[Draw], *, by_module: bool) -> dict[tuple[str, str, int], Draw]:
    """Return random numbers by module, operator, and how often that has drawn before; single numbers are seeds."""
    found: dict[tuple[str, str, int], Draw] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for draw in draws:
        if draw.shape:
            key = (draw.module if by_module else "", draw.op)
            found[*key, counts[key]] = draw
            counts[key] += 1
    return found


def _replicas_of_batches(mesh: Mesh) -> Iterator[tuple[tuple[Coordinate, ...], ...]]:
    """Iterate over the batches: for each place along ``tensor``, the ranks along ``pipe`` that have the batch."""
    for data in range(mesh.data):
        if mesh.tensor > 1:
            yield tuple(
                tuple(mesh.at(pipe=pipe, data=data, tensor=tensor) for pipe in range(mesh.pipe))
                for tensor in range(mesh.tensor)
            )
