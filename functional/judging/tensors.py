"""Compare gradients and values of tensors: what each rank holds with its part of the whole, and replicas with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor

from ...specs.comparison import Difference, DifferenceKind, percent
from ...specs.mesh import MESH_AXES, MODEL_AXES, SPLIT_AXES, Coordinate
from ...specs.param import ParamSpec
from ...specs.plan import Plan
from .layouts import relative
from .observe import Step
from .ranks import RankRun
from .whole import WholeRuns

_ALIKE = 1e-6

_FLOOR = 1e-4
"""Gradients and outputs below this part of the model's typical ones count as noise around zero."""


@frozen
class _Held:
    """What a rank holds of a tensor, without padding, beside its part of the whole model's; None for what it lacks."""

    here: Coordinate
    mine: Tensor | None
    part: Tensor
    has_filled_padding: bool = False

    @property
    def value(self) -> Tensor:
        return torch.zeros_like(self.part) if self.mine is None else self.mine


def different_gradients(
    plan: Plan, whole: Step, ranks: Sequence[RankRun], number: int, order: Sequence[str], tolerance: float
) -> list[Difference]:
    """Return the gradients that differ, in the order of the backward pass, each followed by replicas that differ.

    Args:
        plan: The plan.
        whole: The whole model's step, with gradients averaged over ``data``.
        ranks: The ranks' runs.
        number: Number of the step.
        order: Paths of parameters in the order in which their gradients come.
        tolerance: The relative difference up to which values are equal.
    """
    typical = _typical(present_gradients(whole))
    found: dict[str, list[Difference]] = {}
    for spec in plan.tree.values():
        if spec.kind != "parameter" or not spec.requires_grad:
            continue
        given = whole.gradients.get(spec.path)
        expected = torch.zeros(spec.orig_shape, dtype=torch.float64) if given is None else given
        norm = max(float(expected.norm()), _FLOOR * typical * spec.num_elements**0.5)
        held = [_held(spec, h, run.run.steps[number].gradients, expected) for h, run in _holders(plan, spec, ranks)]
        wrong = [(error, one.here.rank) for one in held if (error := relative(one.value, one.part, norm)) > tolerance]
        padded = [(0.0, one.here.rank) for one in held if one.has_filled_padding]
        if padded and not wrong:
            cause = f"its padding has a gradient{on_ranks(padded)}, and would not stay zero"
            found[spec.path] = [Difference("gradient", spec.path, cause, None, tuple(rank for _, rank in padded))]
        if not wrong:
            continue
        missing = [one.here.rank for one in held if one.mine is None]
        if missing and given is not None:
            cause = f"rank {_list(missing)} has no gradient of it"
        else:
            cause = f"its gradient differs by {percent(max(wrong)[0])}{on_ranks(wrong)}{_why(plan, spec, held, norm)}"
        found[spec.path] = [Difference("gradient", spec.path, cause, *worst(wrong)), *_replicas(spec, held, norm, tolerance)]
    first = {plan.tree[path].path: place for place, path in reversed(list(enumerate(order)))}
    return [d for path in sorted(found, key=lambda path: first.get(path, len(first))) for d in found[path]]


def different_tensors(
    plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int, tolerance: float
) -> Iterator[Difference]:
    """Iterate over weights and buffers that differ after a step; arguments as for :func:`different_gradients`."""
    for spec in plan.tree.values():
        kind: DifferenceKind = "weight" if spec.kind == "parameter" else "buffer"
        held = [
            _held(spec, here, getattr(run.run.steps[number], f"{kind}s"), expected)
            for here, run in _holders(plan, spec, ranks)
            if (expected := getattr(whole.runs[here.index("data")].steps[number], f"{kind}s").get(spec.path)) is not None
        ]
        missing = [one.here.rank for one in held if one.mine is None]
        wrong = [
            (error, one.here.rank)
            for one in held
            if one.mine is not None and (error := relative(one.mine, one.part)) > tolerance
        ]
        if missing:
            yield Difference(kind, spec.path, f"rank {_list(missing)} does not hold it", None, tuple(missing))
        if wrong:
            cause = f"after the step it differs by {percent(max(wrong)[0])}{on_ranks(wrong)}"
            yield Difference(kind, spec.path, cause, *worst(wrong))
            if kind == "weight":
                yield from _replicas(spec, held, float(held[0].part.norm()), tolerance)


def _replicas(spec: ParamSpec, held: Sequence[_Held], norm: float, tolerance: float) -> Iterator[Difference]:
    """Iterate over ranks that hold the same part of a tensor, and have other values of it than the first of them."""
    groups: dict[object, list[_Held]] = {}
    for one in held:
        groups.setdefault(spec.index(one.here), []).append(one)
    for first, *others in groups.values():
        wrong = [(error, o.here.rank) for o in others if (error := relative(o.value, first.value, norm)) > tolerance]
        if wrong:
            ranks = _list([first.here.rank, *(rank for _, rank in wrong)])
            cause = f"ranks {ranks} hold the same part of it, and have values that differ by {percent(max(wrong)[0])}"
            yield Difference("replica", spec.path, cause, *worst([*wrong, (0.0, first.here.rank)]))


def _why(plan: Plan, spec: ParamSpec, held: Sequence[_Held], norm: float) -> str:
    """Return what a wrong gradient looks like, in words: summands that nobody adds, or a sum over the same value."""
    mesh = plan.mesh
    for mesh_axis in reversed(SPLIT_AXES):
        num = mesh.num(mesh_axis)
        if num == 1 or spec.on(mesh_axis):
            continue
        if all(relative(one.value, one.part * num, norm * num) < _ALIKE for one in held):
            return f": it is {num} times too large, as if each rank along {mesh_axis!r} had added the same"
        groups: dict[tuple[int, ...], list[_Held]] = {}
        for one in held:
            rest = tuple(one.here.index(axis) for axis in MESH_AXES if axis != mesh_axis)
            groups.setdefault(rest, []).append(one)
        sums = [(torch.stack([one.value for one in group]).sum(0), group[0].part) for group in groups.values()]
        if mesh_axis in MODEL_AXES and all(relative(total, part, norm) < _ALIKE for total, part in sums):
            return f": each rank along {mesh_axis!r} has a part of the sum, and nobody adds them"
    return ""


def _holders(plan: Plan, spec: ParamSpec, ranks: Sequence[RankRun]) -> Iterator[tuple[Coordinate, RankRun]]:
    """Iterate over the ranks whose stages hold a tensor."""
    everyone = ((plan.mesh.coordinate(rank), run) for rank, run in enumerate(ranks))
    return ((here, run) for here, run in everyone if here.index("pipe") in spec.places(plan.mesh))


def _held(spec: ParamSpec, here: Coordinate, shown: Mapping[str, Tensor | None], expected: Tensor) -> _Held:
    mine = next((shown[path] for path in spec.paths if path in shown), None)
    part = _part(expected, spec, here)
    if mine is None:
        return _Held(here, None, part)
    if mine.dim() and mine.shape[0] > part.shape[0] and spec.local_shape(here) == tuple(mine.shape):
        rows = part.shape[0]
        return _Held(here, mine[:rows], part, has_filled_padding=bool(mine[rows:].any()))
    return _Held(here, mine, part)


def _part(whole: Tensor, spec: ParamSpec, here: Coordinate) -> Tensor:
    """Return the part of a whole tensor that a rank holds."""
    for axis, intervals in enumerate(spec.index(here)):
        if intervals != ((0, whole.shape[axis]),):
            kept = [torch.arange(start, stop) for start, stop in intervals] or [torch.arange(0)]
            whole = whole.index_select(axis, torch.cat(kept))
    return whole


def present_gradients(whole: Step) -> list[Tensor]:
    """Return the gradients of a step, of the parameters that have one."""
    return [gradient for gradient in whole.gradients.values() if gradient is not None]


def norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the norms that differences of outputs or gradients are measured by: their own, or a part of the typical one."""
    finite = [torch.where(tensor.isfinite(), tensor, 0) for tensor in tensors]
    numbers = [tensor if tensor.is_complex() else tensor.to(torch.float64) for tensor in finite]
    typical = _typical(numbers)
    return [max(float(tensor.norm()), _FLOOR * typical * tensor.numel() ** 0.5) for tensor in numbers]


def _typical(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square of all numbers of some tensors."""
    num = sum(tensor.numel() for tensor in tensors)
    return (sum(float(tensor.norm()) ** 2 for tensor in tensors) / num) ** 0.5 if num else 0.0


def worst(found: Sequence[tuple[float, int]]) -> tuple[float, tuple[int, ...]]:
    """Return the largest difference, and the ranks that differ."""
    return max(found)[0], tuple(sorted(rank for _, rank in found))


def on_ranks(found: Sequence[tuple[float, int]]) -> str:
    """Name the ranks that differ."""
    return f" on rank{'s' if len(found) > 1 else ''} {_list([rank for _, rank in found])}"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
