"""The layout steps of a plan: declared steps that matter on its mesh, and sums and biases that follow from the splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ...specs.errors import Problem
from ...specs.layout_steps import (
    AddBiasAfterSync,
    LayoutStep,
    SumGradient,
    Sync,
)
from ...specs.paths import join, module_of
from ..model.linear import linear_of, overrides_forward
from .shared_gradients import shared_gradients

if TYPE_CHECKING:
    from ...specs.mesh import Mesh, MeshAxis
    from ...specs.tree import SpecTree
    from ..layout.local_model import LocalModel


def layout_steps(subject: LocalModel, declared: Iterable[LayoutStep]) -> tuple[list[LayoutStep], list[Problem]]:
    """Return the changes of how modules compute on a mesh, and their problems.

    A bias behind a summed output is added after the sum. Sums of gradients come last, so that the other changes of a module
    see the result of the operator that sums.

    Args:
        subject: The model, its mesh, and its tensors with their splits.
        declared: The steps that the schedule's verbs have declared.
    """
    mesh, tree = subject.mesh, subject.tree
    steps = [step for step in declared if step.matters(mesh)]
    sums = [step for step in steps if isinstance(step, SumGradient)]
    sums += shared_gradients(mesh, tree)
    problems = list(_unequal_gathers(mesh, tree, steps))
    for path, found in _sums_without_bias(subject, steps).items():
        mesh_axis = found[0].mesh_axis
        steps.append(AddBiasAfterSync(path))
        if _is_left_split(path, mesh_axis, steps) and tree[join(path, "bias")].requires_grad:
            sums.append(SumGradient(path, "bias", mesh_axis))
        module = subject.model.get_submodule(path)
        if overrides_forward(module):
            cause = (
                f"its bias belongs after the sum over ranks, and {type(module).__name__} has a forward of its own,"
                f" so that it would be added {mesh.num(mesh_axis)} times"
            )
            problems.append(Problem(path, cause, "Use a plain nn.Linear, or bias=False", tree[join(path, "weight")].type))
    return [*(step for step in steps if not isinstance(step, SumGradient)), *dict.fromkeys(sums)], problems


def _sums_without_bias(subject: LocalModel, steps: Iterable[LayoutStep]) -> dict[str, list[Sync]]:
    """Return the modules whose bias must wait for the sum of their output, each with the steps along that axis."""
    found: dict[str, list[Sync]] = {}
    sums = (s for s in steps if isinstance(s, Sync) and s.when == "forward_post" and s.op != "all_gather")
    for sync in sums:
        if _adds_bias_to_parts(subject, sync):
            found.setdefault(sync.module, []).append(sync)
    return found


def _is_left_split(path: str, mesh_axis: MeshAxis, steps: Iterable[LayoutStep]) -> bool:
    """Tell whether the output of a module is scattered along a mesh axis, and not gathered again by the module itself."""
    here = (s for s in steps if isinstance(s, Sync) and s.when == "forward_post")
    ops = [s.op for s in here if s.module == path and s.mesh_axis == mesh_axis]
    moves = [op for op in ops if op in {"all_gather", "reduce_scatter"}]
    return moves[-1:] == ["reduce_scatter"]


def _adds_bias_to_parts(subject: LocalModel, sync: Sync) -> bool:
    """Tell whether a module is linear with a bias, and each rank has some of its input features."""
    module, weight = subject.model.get_submodule(sync.module), subject.tree.get(join(sync.module, "weight"))
    kind = linear_of(module)
    if kind is None or weight is None or getattr(module, "bias", None) is None:
        return False
    shard = weight.on(sync.mesh_axis)
    return shard is not None and shard.axis == kind.in_axis


def _unequal_gathers(mesh: Mesh, tree: SpecTree, steps: Iterable[LayoutStep]) -> Iterator[Problem]:
    """Iterate over gathers of outputs whose number differs from rank to rank, and that do not know these numbers."""
    gathered = {
        s.module for s in steps if isinstance(s, Sync) and s.op == "all_gather" and s.when == "forward_post" and not s.sizes
    }
    for spec in tree.values():
        uneven = any(s.axis == 0 and not s.is_even(spec.orig_shape[0], mesh) for s in spec.shards)
        for module in {module_of(path) for path in spec.paths} & gathered if uneven else ():
            cause = "its parts differ in size from rank to rank, and a gather of its module's outputs takes equal ones"
            yield Problem(spec.path, cause, f"sch.at[{module!r}].colwise(gather_output=True, uneven=True)", spec.type)
