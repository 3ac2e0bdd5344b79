"""Choose cuts that balance the stages of a model, by parameters or by operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ...specs.errors import PlanError, Problem
from ...specs.paths import join
from ...specs.pipeline import Even
from ..layout.local_model import LocalModel, following
from ..model.known_values import KnownValues
from ..model.read import named_tensors

_NO_CHAIN = "no ModuleList or Sequential holds repeated modules with parameters"


def even_cuts(subject: LocalModel, even: Even) -> tuple[str, ...]:
    """Return cuts between the modules of the longest chain of repeated layers, so that the stages have similar weights.

    With w the weights of the chain's modules, plus the weight before the chain for the first and after it for the last, the
    stages' sums of w have the least sum of squares.

    Args:
        subject: The model.
        even: Number of stages, and the kind of weight.

    Raises:
        PlanError: If there is no such chain, or it is too short.
    """
    paths = longest_chain(subject.model)
    if len(paths) < even.num_stages:
        chain = f"the longest chain of repeated modules has {len(paths)}: {paths[0]} to {paths[-1]}" if paths else _NO_CHAIN
        fix = f"{'Ask for fewer, or cut' if paths else 'Cut'} by hand: sch.at[module].cut_pipeline_stage()"
        raise PlanError([Problem("cut_evenly", f"{even.num_stages} stages are asked for, and {chain}", fix)])
    weights = _parameters(subject, paths) if even.by == "parameters" else _flops(subject, paths, even.num_stages)
    ends = balance(weights, even.num_stages)
    return tuple(paths[end - 1] for end in ends[:-1])


def balance(weights: Sequence[int], num_stages: int) -> list[int]:
    """Return the ends of ``num_stages`` runs of weights, none empty, with the least sum of squared sums.

    Bellman's recursion over the number of runs and the place of the last end, O(len² · num_stages).

    >>> balance([1] * 10, 4)
    [3, 6, 8, 10]
    """
    sums = [0, *accumulate(weights)]
    count = len(weights)
    best: list[tuple[int, list[int]] | None] = [(0, []), *[None] * count]
    for _ in range(num_stages):
        after: list[tuple[int, list[int]] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            reached = [
                (before[0] + (sums[end] - sums[start]) ** 2, start)
                for start in range(end)
                if (before := best[start]) is not None
            ]
            if reached:
                cost, start = min(reached, key=lambda item: (item[0], -item[1]))
                found = best[start]
                assert found is not None, "it was reached"
                after[end] = (cost, [*found[1], end])
        best = after
    final = best[count]
    assert final is not None, "there are at least as many weights as runs"
    return final[1]


def longest_chain(model: nn.Module) -> list[str]:
    """Return the paths of the longest run of modules of one class in one container.

    >>> longest_chain(nn.ModuleDict({"head": nn.Linear(2, 2), "layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}))
    ['layers.0', 'layers.1', 'layers.2']
    """
    longest: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        kinds: dict[type, list[str]] = {}
        for name, child in module.named_children():
            if any(True for _ in child.parameters()):
                kinds.setdefault(type(child), []).append(join(path, name))
        longest = max([longest, *kinds.values()], key=len)
    return longest


def _parameters(subject: LocalModel, paths: Sequence[str]) -> list[int]:
    """Return the number of elements of each module's parameters; a tie counts in each module that holds it."""
    weights = [0] * len(paths)
    order = {path: number for number, (path, _, _) in enumerate(named_tensors(subject.model))}
    start = min((number for path, number in order.items() if path.startswith(f"{paths[0]}.")), default=0)
    for spec in subject.tree.values():
        if spec.kind == "parameter":
            for at in {_chain_place(paths, path, before=order[path] < start) for path in spec.paths}:
                weights[at] += spec.num_elements
    return weights


def _flops(subject: LocalModel, paths: Sequence[str], num_stages: int) -> list[int]:
    """Return the operations of each module in a forward pass on fake tensors, as torch counts them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    local = subject.fake_copy(mode)
    done: dict[str, tuple[int, int]] = {}
    counter = FlopCounterMode(display=False)
    for path in paths:
        _count_flops(local.get_submodule(path), path, counter, done)
    with following(mode, values := KnownValues()), torch.no_grad(), counter:
        local(**subject.fake_inputs(values))
    if missing := [path for path in paths if path not in done]:
        fix = f'Call it, or sch.cut_evenly({num_stages}, by="parameters")'
        raise PlanError([Problem(path, "it is never called, so that it has no flops", fix) for path in missing])
    weights = [end - start for start, end in (done[path] for path in paths)]
    weights[0] += min(start for start, _ in done.values())
    weights[-1] += counter.get_total_flops() - max(end for _, end in done.values())
    return weights


def _count_flops(module: nn.Module, path: str, counter: FlopCounterMode, done: dict[str, tuple[int, int]]) -> None:
    start: list[int] = []

    def enter(*_: object) -> None:
        start.append(counter.get_total_flops())

    def leave(*_: object) -> None:
        done[path] = (start.pop(), counter.get_total_flops())

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _chain_place(paths: Sequence[str], path: str, *, before: bool) -> int:
    for place, module in enumerate(paths):
        if path.startswith(f"{module}."):
            return place
    return 0 if before else len(paths) - 1
