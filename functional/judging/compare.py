"""Compare what ranks have shown with what the whole model has shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

import torch
from attrs import evolve, frozen

from ...specs.comparison import Difference, percent
from ...specs.plan import Plan
from .first_module import first_module
from .layouts import disagreement, groups_of_model, known_splits, relative
from .masks import different_masks
from .observe import Step
from .ranks import RankRun
from .stopped import stopped
from .tensors import different_gradients, different_tensors, norms, on_ranks, worst
from .whole import WholeRuns


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


def compare(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], tolerance: float, *, has_loss: bool = False) -> Judged:
    """Compare all ranks of a plan with the whole model.

    Args:
        plan: The plan.
        whole: The whole model's runs, one for each place along ``data``.
        ranks: The ranks' runs, in order.
        tolerance: The relative difference up to which values are equal.
        has_loss: Whether the loss is the user's, so that outputs may be split, or summands: the loss judges them.
    """
    differences, notes = [*stopped(ranks)], list[str]()
    module, num_modules = first_module(plan, whole, ranks, tolerance)
    if not differences:
        for number, step in enumerate(whole.runs[0].steps):
            found = [
                *(
                    _outputs_of_any_kind(plan, whole, ranks, number, tolerance, notes)
                    if has_loss
                    else _outputs(plan, whole, ranks, number, tolerance)
                ),
                *_losses(plan, whole, ranks, number, tolerance),
                *different_gradients(plan, step, ranks, number, whole.order, tolerance),
            ]
            if not found:
                found += different_tensors(plan, whole, ranks, number, tolerance)
            differences += [_at_step(difference, number) for difference in found]
            if found:
                break
        differences += different_masks(plan, whole, ranks, notes)
    known = {path for spec in plan.tree.values() for path in spec.paths}
    late = [path for path in whole.runs[0].steps[0].buffers if path not in known]
    notes += [f"{path} is made while the model runs, and is not compared" for path in late]
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
    wrong: dict[int, list[tuple[float, int]]] = {}
    for rank, step, expected in _steps(plan, whole, ranks, number):
        if step.outputs is None or expected.outputs is None:
            continue
        shapes = [list(tensor.shape) for tensor in step.outputs]
        wanted = [list(tensor.shape) for tensor in expected.outputs]
        if shapes != wanted:
            cause = f"its outputs have the shapes {_listed(shapes)} on rank {rank}, and {_listed(wanted)} in the whole model"
            yield Difference("shape", "", cause, None, (rank,))
            return
        if step.numbers is not None and step.numbers != expected.numbers:
            mine, theirs = torch.tensor(step.numbers), torch.tensor(expected.numbers)
            if relative(mine, theirs) > tolerance:
                cause = f"it returns the numbers {step.numbers} on rank {rank}, and {expected.numbers} in the whole model"
                yield Difference("output", "", cause, None, (rank,))
        sizes = norms(expected.outputs)
        for place, (held, tensor, norm) in enumerate(zip(step.outputs, expected.outputs, sizes, strict=True)):
            error = relative(held, tensor, norm)
            if error > tolerance:
                wrong.setdefault(place, []).append((error, rank))
    for place, found in wrong.items():
        which = _name(place, whole, number)
        yield Difference("output", "", f"{which} differs by {percent(max(found)[0])}{on_ranks(found)}", *worst(found))


def _outputs_of_any_kind(
    plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int, tolerance: float, notes: list[str]
) -> Iterator[Difference]:
    """Iterate over outputs that differ however ranks may hold them: whole, split, or as summands."""
    splits = known_splits(plan.tree)
    for group in groups_of_model(plan.mesh):
        held = [ranks[here.rank].run.steps[number].outputs for here in group]
        for place, tensor in enumerate(whole.runs[group[0].index("data")].steps[number].outputs or ()):
            if any(outputs is None for outputs in held):
                continue
            mine = [outputs[place] for outputs in held if outputs and place < len(outputs)]
            error = disagreement(tensor, mine, group, splits) if len(mine) == len(held) else None
            which = _name(place, whole, number)
            if error is None or not isfinite(error):
                notes.append(f"{which} could not be compared: ranks hold it in no way that is known; its loss was")
            elif error > tolerance:
                told = tuple(here.rank for here in group)
                yield Difference("output", "", f"{which} differs by {percent(error)}", error, told)


def _name(place: int, whole: WholeRuns, number: int) -> str:
    return f"output {place}" if len(whole.runs[0].steps[number].outputs or ()) > 1 else "its output"


def _losses(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int, tolerance: float) -> Iterator[Difference]:
    found: list[tuple[float, int]] = []
    for rank, step, expected in _steps(plan, whole, ranks, number):
        if step.loss is not None and expected.loss is not None:
            error = relative(step.loss.detach(), expected.loss.detach())
            # a sum that nearly cancels has a small loss, and no precise one
            if error > max(tolerance, 1e-6):
                found.append((error, rank))
    if found:
        yield Difference("loss", "", f"the loss differs by {percent(max(found)[0])}{on_ranks(found)}", *worst(found))


def _steps(plan: Plan, whole: WholeRuns, ranks: Sequence[RankRun], number: int) -> Iterator[tuple[int, Step, Step]]:
    """Iterate over the ranks with their step, and the step of the whole model on their inputs."""
    for rank, run in enumerate(ranks):
        yield rank, run.run.steps[number], whole.runs[plan.mesh.coordinate(rank).index("data")].steps[number]


def _listed(shapes: Sequence[list[int]]) -> str:
    return ", ".join(map(str, shapes)) or "of no tensor"
