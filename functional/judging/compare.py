"""Compare what ranks have shown with what the whole model has shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from ...specs.comparison import Difference, percent
from ...specs.index import index_shape
from ...specs.mesh import Coordinate
from ...specs.param import ParamSpec
from ...specs.plan import Plan
from .first_module import first_module
from .layouts import relative
from .masks import different_masks
from .observe import Step
from .ranks import RankRun
from .stopped import stopped
from .whole import WholeRuns

_ALIKE = 1e-6

FLOOR = 1e-4
"""Gradients below this part of the typical gradient of the model count as noise around zero."""


@frozen
class Judged:
    """What a comparison found.

    Args:
        differences: Everything that differs.
        first: Where it begins.
        num_modules: Number of modules whose outputs could be compared.
        notes: What could not be compared.
    """

    differences: tuple[Difference, ...]
    first: Difference | None
    num_modules: int
    notes: tuple[str, ...] = ()


def compare(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], tolerance: float) -> Judged:
    """Compare all ranks of a plan with the whole model.

    Args:
        plan: The plan.
        whole: The whole model's runs, one for each place along ``data``.
        ranks: The ranks' runs, in order.
        tolerance: The relative difference up to which values are equal.
    """
    differences, notes = [*stopped(ranks)], list[str]()
    module, num_modules = first_module(plan, whole, ranks, tolerance)
    if not differences:
        for number, step in enumerate(whole.runs[0].steps):
            found = [
                *_outputs(plan, whole, ranks, number, tolerance),
                *_losses(plan, whole, ranks, number, tolerance),
                *_gradients(plan, step, ranks, number, whole.order, tolerance),
            ]
            found += _tensors(plan, whole, ranks, number, tolerance, found)
            differences += [_at_step(difference, number) for difference in found]
            if found:
                break
        differences += different_masks(plan, whole, ranks, notes)
    return Judged(tuple(dict.fromkeys(differences)), _first(differences, module), num_modules, tuple(dict.fromkeys(notes)))


def _first(differences: Sequence[Difference], module: Difference | None) -> Difference | None:
    """Return where it begins: where a rank stops, else the first module whose output differs, else the first difference."""
    stopped = next((d for d in differences if d.kind in ("error", "hang", "collective")), None)
    if stopped is not None:
        return stopped
    is_forward = any(d.kind in ("shape", "output", "loss") for d in differences)
    if is_forward and module is not None:
        return module
    return next(iter(differences), None)


def _at_step(difference: Difference, number: int) -> Difference:
    return evolve(difference, cause=f"{difference.cause} (step {number + 1})") if number else difference


def _outputs(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int, tolerance: float) -> Iterator[Difference]:
    """Iterate over outputs that have another shape, or other values, than those of the whole model."""
    worst: dict[int, list[tuple[float, int]]] = {}
    for rank, step, expected in _steps(plan, whole, ranks, number):
        if step.outputs is None or expected.outputs is None:
            continue
        shapes = [list(tensor.shape) for tensor in step.outputs]
        wanted = [list(tensor.shape) for tensor in expected.outputs]
        if shapes != wanted:
            cause = f"its outputs have the shapes {_listed(shapes)} on rank {rank}, and {_listed(wanted)} in the whole model"
            yield Difference("shape", "", cause, None, (rank,))
            return
        for place, (held, tensor) in enumerate(zip(step.outputs, expected.outputs, strict=True)):
            error = relative(held, tensor)
            if error > tolerance:
                worst.setdefault(place, []).append((error, rank))
    for place, found in worst.items():
        which = f"output {place}" if len(whole.runs[0].steps[number].outputs or ()) > 1 else "its output"
        yield Difference("output", "", f"{which} differs by {percent(max(found)[0])}{_on(found)}", *_worst(found))


def _losses(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int, tolerance: float) -> Iterator[Difference]:
    found: list[tuple[float, int]] = []
    for rank, step, expected in _steps(plan, whole, ranks, number):
        if step.loss is not None and expected.loss is not None:
            error = relative(step.loss.detach(), expected.loss.detach())
            # a sum that nearly cancels has a small loss, and no precise one
            if error > max(tolerance, 1e-6):
                found.append((error, rank))
    if found:
        yield Difference("loss", "", f"the loss differs by {percent(max(found)[0])}{_on(found)}", *_worst(found))


def _gradients(
    plan: Plan, whole: Step, ranks: Sequence[RankRun], number: int, order: Sequence[str], tolerance: float
) -> list[Difference]:
    """Return the differences of gradients, in the order of the backward pass; then gradients that replicas disagree on."""
    typical = _typical(whole)
    found: dict[str, Difference] = {}
    for spec in plan.tree.values():
        if spec.kind != "parameter" or not spec.requires_grad:
            continue
        given = whole.gradients.get(spec.path)
        expected = torch.zeros(spec.orig_shape, dtype=torch.float64) if given is None else given
        norm = max(float(expected.norm()), FLOOR * typical * spec.num_elements**0.5)
        held = list(_held(plan, spec, ranks, number, "gradients"))
        parts: list[tuple[Coordinate, Tensor, Tensor]] = []
        for here, mine in held:
            part = _part(expected, spec, here)
            parts.append((here, torch.zeros_like(part) if mine is None else _unpadded(mine, spec, here), part))
        errors = [(relative(mine, part, norm), here.rank) for here, mine, part in parts]
        wrong = [(error, rank) for error, rank in errors if error > tolerance]
        if wrong:
            cause = f"its gradient differs by {percent(max(wrong)[0])}{_on(wrong)}{_why(plan, spec, parts, norm)}"
            missing = [here.rank for here, mine in held if mine is None]
            if missing and given is not None:
                cause = f"rank {_list(missing)} has no gradient of it"
            found[spec.path] = Difference("gradient", spec.path, cause, *_worst(wrong))
    first = {plan.tree[path].path: place for place, path in reversed(list(enumerate(order)))}
    return sorted(found.values(), key=lambda difference: first.get(difference.path, len(first)))


def _why(plan: Plan, spec: ParamSpec, parts: Sequence[tuple[Coordinate, Tensor, Tensor]], norm: float) -> str:
    """Return what a wrong gradient looks like, in words: summands that nobody adds, or a sum over the same value."""
    mesh = plan.mesh
    for mesh_axis in ("tensor", "data", "expert"):
        num = mesh.num(mesh_axis)
        if num == 1 or spec.on(mesh_axis):
            continue
        if all(relative(mine, part * num, norm * num) < _ALIKE for _, mine, part in parts):
            return f": it is {num} times too large, as if each rank along {mesh_axis!r} had added the same"
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for here, mine, part in parts:
            rest = tuple(here.index(axis) for axis in ("pipe", "data", "tensor") if axis != mesh_axis)
            groups.setdefault(rest, []).append((mine, part))
        if mesh_axis == "tensor" and all(
            relative(torch.stack([mine for mine, _ in group]).sum(0), group[0][1], norm) < _ALIKE
            for group in groups.values()
        ):
            return f": each rank along {mesh_axis!r} has a part of the sum, and nobody adds them"
    return ""


def _tensors(
    plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int, tolerance: float, found: Sequence[Difference]
) -> Iterator[Difference]:
    """Iterate over weights and buffers that differ after the step, where no gradient says so already."""
    known = {difference.path for difference in found}
    if any(difference.kind == "output" for difference in found):
        return
    for spec in plan.tree.values():
        if spec.path in known:
            continue
        kind, what = ("weight", "weights") if spec.kind == "parameter" else ("buffer", "buffers")
        wrong: list[tuple[float, int]] = []
        for here, mine in _held(plan, spec, ranks, number, what):
            expected = getattr(whole.runs[here.index("data")].steps[number], what).get(spec.path)
            if mine is not None and expected is not None:
                error = relative(_unpadded(mine, spec, here), _part(expected, spec, here))
                wrong += [(error, here.rank)] if error > tolerance else []
        if wrong:
            cause = f"after the step it differs by {percent(max(wrong)[0])}{_on(wrong)}"
            yield Difference(kind, spec.path, cause, *_worst(wrong))


def _steps(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int) -> Iterator[tuple[int, Step, Step]]:
    """Iterate over the ranks with their step, and the step of the whole model on their inputs."""
    for rank, run in enumerate(ranks):
        yield rank, run.run.steps[number], whole.runs[plan.mesh.coordinate(rank).index("data")].steps[number]


def _held(
    plan: Plan, spec: ParamSpec, ranks: Sequence[RankRun], number: int, what: str
) -> Iterator[tuple[Coordinate, Tensor | None]]:
    """Iterate over the ranks that hold a tensor, with what they have of it."""
    for rank, run in enumerate(ranks):
        here = plan.mesh.coordinate(rank)
        held = getattr(run.run.steps[number], what)
        path = next((path for path in spec.paths if path in held), None)
        if path is not None:
            yield here, held[path]


def _part(whole: Tensor, spec: ParamSpec, here: Coordinate) -> Tensor:
    """Return the part of a whole tensor that a rank holds."""
    for axis, intervals in enumerate(spec.index(here)):
        if intervals != ((0, whole.shape[axis]),):
            kept = [torch.arange(start, stop) for start, stop in intervals] or [torch.arange(0)]
            whole = whole.index_select(axis, torch.cat(kept))
    return whole


def _unpadded(held: Tensor, spec: ParamSpec, here: Coordinate) -> Tensor:
    """Return what a rank holds of a tensor, without the padding after it."""
    shape = index_shape(spec.index(here))
    return held[: shape[0]] if shape and held.shape != shape else held


def _typical(step: Step) -> float:
    """Return the root mean square of all gradients."""
    found = [gradient for gradient in step.gradients.values() if gradient is not None]
    num = sum(gradient.numel() for gradient in found)
    return (sum(float(gradient.norm()) ** 2 for gradient in found) / num) ** 0.5 if num else 0.0


def _worst(found: Sequence[tuple[float, int]]) -> tuple[float, tuple[int, ...]]:
    return max(found)[0], tuple(sorted(rank for _, rank in found))


def _listed(shapes: Sequence[list[int]]) -> str:
    return ", ".join(map(str, shapes)) or "of no tensor"


def _on(found: Sequence[tuple[float, int]]) -> str:
    return f" on rank{'s' if len(found) > 1 else ''} {_list([rank for _, rank in found])}"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
