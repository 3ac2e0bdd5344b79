"""Cut a model into the stages that a schedule declares, and check the declaration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

from ...specs.errors import Problem
from ...specs.layout_steps import ForkRng
from ...specs.steps import SumTied
from .cuts import even_cuts
from .example_inputs import recorded
from .partition import Partition, export_stages
from .sequential import is_sequence, sequential_stages, slice_sequence

if TYPE_CHECKING:
    from ...specs.declaration import Declaration
    from ...specs.mesh import Mesh
    from ...specs.tree import SpecTree
    from ..layout.local_model import LocalModel


def is_cut(sch: Declaration) -> bool:
    """Tell whether a schedule declares stages."""
    return bool(sch.cuts or sch.handed or sch.even)


def wrong_stages(sch: Declaration, example_inputs: Mapping[str, Any] | None) -> list[Problem]:
    """Return the problems of a schedule's stages that show without running the model's code."""
    problems = list(_cuts_in_leaves(sch))
    declared = [
        name
        for name, given in (("cut_pipeline_stage", sch.cuts), ("cut_evenly", sch.even), ("with_stages", sch.handed))
        if given
    ]
    if len(declared) > 1:
        problems.append(Problem("", f"stages are declared by {' and by '.join(declared)}", "Keep one of them"))
    if sch.mesh.pipe > 1 and not declared and not sch.problems:
        cause = f"the mesh has pipe={sch.mesh.pipe}, and nothing is cut: ranks past the first stage would hold nothing"
        as_many = f"Mesh(data={sch.mesh.data * sch.mesh.pipe}, tensor={sch.mesh.tensor}) has as many ranks"
        fix = f"sch.at[module].cut_pipeline_stage(), or sch.cut_evenly({sch.mesh.pipe}); {as_many}"
        problems.append(Problem("", cause, fix))
    problems += _left_out(sch)
    if declared and isinstance(example_inputs, Mapping):
        problems += recorded(example_inputs)[1]
    if declared and example_inputs is None:
        cause = "stages are found by calling the model on fake tensors, and it is not known with what"
        fix = "plan_build(..., example_inputs={'input_ids': torch.zeros(2, 16, dtype=torch.long)}); meta tensors will do"
        fix += "; on the command line --batch 2 --sequence 16"
        problems.append(Problem("example_inputs", cause, fix))
    return problems


def wrong_for_stages(subject: LocalModel) -> Iterator[Problem]:
    """Iterate over the problems of layouts that a single graph for all ranks cannot express."""
    for spec in subject.tree.values():
        if any(not shard.is_even(spec.orig_shape[shard.axis], subject.mesh) for shard in spec.shards):
            cause = "its parts differ in size from rank to rank, and a stage has one graph for all of them"
            yield Problem(spec.path, cause, "Split it evenly: pad it, or split it over fewer ranks", spec.type)
    for step in subject.layout:
        if isinstance(step, ForkRng) and not any(f"{step.module}.".startswith(f"{leaf}.") for leaf in subject.leaves):
            cause = "its random numbers differ from rank to rank, which the graph of a stage cannot say"
            yield Problem(step.module, cause, f"Let it run as it is: sch.at[{step.module!r}].leaf()")


def cut_model(sch: Declaration, subject: LocalModel) -> Partition:
    """Return the stages that a schedule declares.

    Raises:
        PlanError: If the model cannot be cut in this way.
    """
    if sch.handed:
        return sequential_stages(subject, sch.handed)
    cuts = even_cuts(subject, sch.even) if sch.even else sch.cuts
    changed = {step.module for step in subject.layout}
    if is_sequence(subject.model, cuts) and "" not in changed:
        return sequential_stages(subject, slice_sequence(subject.model, cuts))
    return export_stages(subject, cuts)


def on_their_stages(tree: SpecTree, partition: Partition) -> SpecTree:
    """Return the tensors with the stages that hold them: the first stage owns a tensor, any further stage holds a copy."""
    holders = partition.holders
    return tree.map(lambda spec: evolve(spec, stage=holders[spec.path][0], also_on=holders[spec.path][1:]))


def tied_across(mesh: Mesh, tree: SpecTree) -> list[SumTied]:
    """Return the trained tensors that several places along ``pipe`` hold."""
    return [
        SumTied(spec.path, spec.places(mesh))
        for spec in tree.values()
        if spec.kind == "parameter" and spec.requires_grad and len(spec.places(mesh)) > 1
    ]


def _cuts_in_leaves(sch: Declaration) -> Iterator[Problem]:
    for path in sch.cuts:
        for leaf in sch.leaves:
            if path.startswith(f"{leaf}."):
                cause = f"it is inside {leaf!r}, a leaf, which runs as one operation"
                yield Problem(path, cause, f"Cut after {leaf!r}, or do not mark it as a leaf")


def _left_out(sch: Declaration) -> list[Problem]:
    """Return the problems of tensors in none of the stages that were handed over."""
    paths = [path for stage in sch.handed for path in stage]
    prefixes = tuple(f"{path}." if path else "" for path in paths)
    cause = "it is in none of the stages that were handed over"
    return [
        Problem(spec.path, cause, "Hand over a module that holds it", spec.type)
        for spec in (sch.tree.values() if paths else ())
        if not any(path.startswith(prefixes) for path in spec.paths)
    ]
