"""What a plan must do exactly once: sum the gradients that ranks share, and hand the module over. No torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...specs.proof import Failure
from ...specs.steps import MakeOptimizer, SumGradient, SumTied, TakeStages, Wrap
from ..planning.shared_gradients import shared_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...specs.plan import Plan


def num_once(plan: Plan) -> int:
    """Return how many things a plan must do exactly once: its sums of gradients, and to hand the module over."""
    return 1 + len(list(shared_gradients(plan.mesh, plan.tree))) + sum(isinstance(step, SumTied) for step in plan.steps)


def not_once(plan: Plan) -> Iterator[Failure]:
    """Iterate over what a plan does not do, or does again.

    Of a tensor split over ``expert``, and of one with repeated granules, each use has one sum of its gradient, along the
    mesh axis, over the neighbours and divided by the number that its split asks for. Other sums and synchronisations are the
    schedule's word on what its modules compute, which a plan cannot know.
    """
    sums: dict[tuple[str, str, str], list[SumGradient]] = {}
    for step in plan.steps:
        if isinstance(step, SumGradient):
            sums.setdefault((step.module, step.name, step.mesh_axis), []).append(step)
    for wanted in shared_gradients(plan.mesh, plan.tree):
        found = sums.get((wanted.module, wanted.name, wanted.mesh_axis), [])
        if found != [wanted]:
            path = f"{wanted.module}.{wanted.name}".lstrip(".")
            yield Failure(path, f"{_found(found)}, and its split asks for one: {wanted}")
    tied = Counter(step.path for step in plan.steps if isinstance(step, SumTied))
    for path, num in tied.items():
        if num > 1:
            yield Failure(path, f"its gradient is summed along 'pipe' {num} times")
    yield from _handover(plan)


def _found(sums: list[SumGradient]) -> str:
    match sums:
        case []:
            return "no step sums its gradient"
        case [other]:
            return f"a step sums its gradient otherwise: {other}"
        case _:
            return f"{len(sums)} steps sum its gradient"


def _handover(plan: Plan) -> Iterator[Failure]:
    """Iterate over what is wrong with the steps that end a plan."""
    targets = [step.target for step in plan.steps if isinstance(step, Wrap)]
    if len(targets) != 1:
        yield Failure("", f"{len(targets) or 'no'} steps hand the module to its target (Wrap), and one must")
    elif targets != [plan.target]:
        yield Failure("", f"its target is {plan.target}, and the module is handed to {targets[0]}")
    num_optimizers = sum(isinstance(step, MakeOptimizer) for step in plan.steps)
    if num_optimizers > 1:
        yield Failure("", f"{num_optimizers} steps make an optimizer (MakeOptimizer), and one at most may")
    num_taken, is_cut = sum(isinstance(step, TakeStages) for step in plan.steps), plan.pipeline is not None
    if num_taken != is_cut:
        whole = "has stages, and one must" if is_cut else "is not cut, and none may"
        yield Failure("", f"{num_taken or 'no'} steps keep the stages of a rank (TakeStages): the model {whole}")
