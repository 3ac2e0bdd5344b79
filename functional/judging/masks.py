"""Random masks: equal on ranks that hold the same values, and different on ranks that hold different parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from ...specs.comparison import Difference
from ...specs.mesh import Coordinate, Mesh
from ...specs.plan import Plan
from .exact import Draw
from .layouts import known_splits, parts_of
from .ranks import RankRun
from .whole import WholeRuns


def different_masks(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], notes: list[str]) -> Iterator[Difference]:
    """Iterate over modules whose random masks are equal where ranks hold other parts, or differ where they hold the same."""
    has_modules = plan.pipeline is None  # the graphs of stages have none
    splits = known_splits(plan.tree)
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
            parts = parts_of(wanted.shape, [mask.shape for mask in masks], [places[0] for places in group], splits)
            pairs = list(combinations(zip(parts, (mask.values for mask in masks), strict=True), 2))
            same = [_are_equal(one, other) for (here, one), (there, other) in pairs if here == there]
            different = [_are_equal(one, other) for (here, one), (there, other) in pairs if here != there]
            if not all(same):
                cause = f"ranks draw different random numbers ({key[1]}) where they hold the same values"
                yield Difference("dropout", wanted.module, cause, None, everyone)
            if any(different) and all(mask.values is not None and mask.values.unique().numel() > 1 for mask in masks):
                cause = f"ranks draw the same random numbers ({key[1]}) where they hold different parts"
                yield Difference("dropout", wanted.module, cause, None, everyone)


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    assert one is not None, "ranks draw with values"
    assert other is not None, "ranks draw with values"
    return one.shape == other.shape and torch.equal(one, other)


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
