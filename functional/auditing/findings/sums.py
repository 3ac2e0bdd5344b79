"""Sums over ranks that count too often, or are not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....specs.finding import Finding
from ....specs.steps import AddBiasAfterSync, Sync
from .module_paths import modules_around

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan


def whole_biases(plan: Plan) -> Iterator[Finding]:
    """Find biases that every rank adds to its part of an output."""
    first = plan.mesh.coordinate(0)
    deferred = {step.module for step in plan.steps if isinstance(step, AddBiasAfterSync)}
    for spec in plan.tree.values():
        path = f"{spec.module}.bias" if spec.module else "bias"
        if not spec.path.endswith("weight") or path not in plan.tree or spec.module in deferred:
            continue
        bias = plan.tree[path]
        if not spec.mesh_axes(first) or bias.mesh_axes(first):
            continue
        num = plan.mesh.num(*spec.mesh_axes(first))
        cause = f"{bias.type} is whole beside {spec.type}: each of {num} ranks adds it, and a sum counts it {num} times"
        fix = f"sch.at[{spec.module!r}].rowwise() adds it once, on a plain nn.Linear; or split it: .shard('bias', axis=0)"
        yield Finding("SP012", "error", bias.path, cause, fix)


def counted_twice(plan: Plan) -> Iterator[Finding]:
    """Find sums over ranks whose modules hold the same tensors: each would be counted as many times as there are ranks."""
    first = plan.mesh.coordinate(0)
    holders = {prefix for path in plan.tree.all_paths for prefix in modules_around(path)}
    split = {
        (mesh_axis, prefix)
        for spec in plan.tree.values()
        for mesh_axis in spec.mesh_axes(first)
        for path in spec.paths
        for prefix in modules_around(path)
    }
    for step in plan.steps:
        match step:
            case Sync(when="forward_post", op="all_reduce" | "reduce_scatter"):
                what = "output"
            case Sync(when="backward_post", op="all_reduce" | "reduce_scatter") | Sync(when="forward_pre", op="all_gather"):
                what = "input's gradient"
            case _:
                continue
        if step.module in holders and (step.mesh_axis, step.module) not in split:
            num = plan.mesh.num(step.mesh_axis)
            cause = f"{step} sums its {what} over {num} ranks that hold the same tensors, so that it counts {num} times"
            yield Finding("SP013", "warning", step.module, cause, "Split its tensors, or synchronise the module before it")
