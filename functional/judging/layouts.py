"""How ranks may hold an activation of the whole model: whole, as summands, or split; and how well each way agrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

from ...specs.intervals import Interval
from ...specs.mesh import MESH_AXES, MODEL_AXES, Coordinate, Mesh
from ...specs.shard import Shard
from ...specs.tree import SpecTree


@frozen
class KnownSplit:
    """A way in which the ranks of a mesh hold an axis of a given size."""

    size: int
    shard: Shard


def known_splits(tree: SpecTree) -> tuple[KnownSplit, ...]:
    """Return the ways in which a plan splits axes over the ranks of a model: activations are split in the same ways."""
    found = (
        KnownSplit(spec.orig_shape[shard.axis], shard)
        for spec in tree.values()
        for shard in spec.shards
        if shard.mesh_axis in MODEL_AXES
    )
    return tuple(dict.fromkeys(found))


def disagreement(
    whole: Tensor, held: Sequence[Tensor], coordinates: Sequence[Coordinate], splits: Sequence[KnownSplit]
) -> float | None:
    """Return the relative difference of what ranks hold from the whole, for the way of holding it that agrees best.

    Args:
        whole: The whole model's activation.
        held: What each rank has in its place.
        coordinates: The ranks.
        splits: The ways in which axes are split.

    Returns:
        The norm of the difference over that of the whole, infinite if ranks hold more than the whole; None if the sizes
        fit no known way.
    """
    if any(tensor.dim() != whole.dim() for tensor in held):
        return None
    if any(mine > all_ for tensor in held for mine, all_ in zip(tensor.shape, whole.shape, strict=True)):
        return float("inf")
    if all(tensor.shape == whole.shape for tensor in held):
        return min(max(relative(tensor, whole) for tensor in held), relative(torch.stack(list(held)).sum(0), whole))
    axes = {
        axis
        for tensor in held
        for axis, (mine, all_) in enumerate(zip(tensor.shape, whole.shape, strict=True))
        if mine != all_
    }
    if len(axes) != 1:
        return None
    (axis,) = axes
    tried = [
        max(relative(mine, whole.index_select(axis, _entries(own))) for mine, own in zip(held, parts, strict=True))
        for parts in ways(whole.shape[axis], [tensor.shape[axis] for tensor in held], coordinates, splits)
    ]
    return min(tried, default=None)


def relative(held: Tensor, whole: Tensor, norm: Tensor | float | None = None) -> float:
    """Return the norm of a difference over that of the whole, or over a given norm; equal non-finite numbers agree.

    >>> relative(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])), relative(torch.zeros(2), torch.ones(2))
    (0.0, 1.0)
    """
    if held.shape != whole.shape or held.is_complex() != whole.is_complex():
        return float("inf")
    if not whole.numel():
        return 0.0
    held, whole = _as_doubles(held), _as_doubles(whole)
    same = (held == whole) | (held.isnan() & whole.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, 0.0, held - whole)
    if not bool(difference.isfinite().all()):
        return float("inf")
    size = float(torch.where(whole.isfinite(), whole, 0.0).norm()) if norm is None else float(norm)
    return float(difference.norm()) / size if size else float("inf")


def _as_doubles(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()).to(torch.float64) if tensor.is_complex() else tensor.to(torch.float64)


def _entries(intervals: Sequence[Interval]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in intervals]) if intervals else torch.arange(0)


def parts_of(
    whole: Sequence[int], held: Sequence[Sequence[int]], coordinates: Sequence[Coordinate], splits: Sequence[KnownSplit]
) -> list[object]:
    """Return which part of an activation each rank holds, by shapes alone: equal for ranks that hold the same part.

    Args:
        whole: Shape of the whole model's activation.
        held: Shape of what each rank has in its place.
        coordinates: The ranks.
        splits: The ways in which axes are split.
    """
    if all(tuple(shape) == tuple(whole) for shape in held):
        return [None] * len(held)
    axes = {axis for shape in held for axis, (mine, all_) in enumerate(zip(shape, whole, strict=False)) if mine != all_}
    if len(axes) == 1 and all(len(shape) == len(whole) for shape in held):
        (axis,) = axes
        for found in ways(whole[axis], [shape[axis] for shape in held], coordinates, splits):
            return [tuple(intervals) for intervals in found]
    return list(range(len(held)))


def ways(
    size: int, held: Sequence[int], coordinates: Sequence[Coordinate], splits: Sequence[KnownSplit]
) -> Iterator[list[list[Interval]]]:
    """Iterate over ways to split an axis so that each rank has as many entries as it holds: the intervals of each rank."""
    if sum(held) == size:
        starts = [sum(held[:place]) for place in range(len(held))]
        yield [[(start, start + num)] for start, num in zip(starts, held, strict=True)]
    for known in splits:
        rest = known.size % size
        if rest:
            continue
        unit = known.size // size  # an axis of heads, where the tensor has heads times features
        own = [list(known.shard.intervals(known.size, here)) for here in coordinates]
        if any(edge % unit for intervals in own for interval in intervals for edge in interval):
            continue
        scaled = [[(start // unit, stop // unit) for start, stop in intervals] for intervals in own]
        if all(sum(stop - start for start, stop in o) == num for o, num in zip(scaled, held, strict=True)):
            yield scaled


def groups_of_model(mesh: Mesh) -> tuple[tuple[Coordinate, ...], ...]:
    """Return the ranks that hold one stage of a model for one batch, for each place along the other axes."""
    found: dict[tuple[int, ...], list[Coordinate]] = {}
    for rank in range(mesh.num_ranks):
        here = mesh.coordinate(rank)
        place = tuple(here.index(mesh_axis) for mesh_axis in MESH_AXES if mesh_axis not in MODEL_AXES)
        found.setdefault(place, []).append(here)
    return tuple(map(tuple, found.values()))
