"""From what a schedule says of stages to the stages: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

from ...specs.errors import Problem
from ...specs.layout_steps import ForkRng
from ...specs.steps import SumTied
from .cuts import even_cuts, wrong_cuts
from .example_inputs import recorded
from .partition import Partition, partition
from .sequential import chain, is_sequence, slices

if TYPE_CHECKING:
    from ...specs.declaration import Declaration
    from ...specs.mesh import Mesh
    from ...specs.tree import SpecTree
    from ..layout.local_model import LocalModel


def is_cut(sch: Declaration) -> bool:
    """Tell whether anything was said of stages."""
    return bool(sch.cuts or sch.handed or sch.even)


def wrong_stages(sch: Declaration, example_inputs: Mapping[str, Any] | None) -> list[Problem]:
    """Return what is wrong with what was said of stages, as far as it can be seen without the model's code."""
    problems = list(wrong_cuts(sch.cuts, sch.leaves))
    said = [
        name
        for name, given in (("cut_pipeline_stage", sch.cuts), ("cut_evenly", sch.even), ("with_stages", sch.handed))
        if given
    ]
    if len(said) > 1:
        problems.append(Problem("", f"stages are declared by {' and by '.join(said)}", "Keep one of them"))
    if sch.mesh.pipe > 1 and not said and not sch.problems:
        cause = f"the mesh has pipe={sch.mesh.pipe}, and nothing is cut: ranks past the first stage would hold nothing"
        as_many = f"Mesh(data={sch.mesh.data * sch.mesh.pipe}, tensor={sch.mesh.tensor}) has as many ranks"
        fix = f"sch.at[module].cut_pipeline_stage(), or sch.cut_evenly({sch.mesh.pipe}); {as_many}"
        problems.append(Problem("", cause, fix))
    problems += _left_out(sch)
    if said and isinstance(example_inputs, Mapping):
        problems += recorded(example_inputs)[1]
    if said and example_inputs is None:
        cause = "stages are found by calling the model on fake tensors, and it is not known with what"
        fix = "plan_build(..., example_inputs={'input_ids': torch.zeros(2, 16, dtype=torch.long)}); meta tensors will do"
        fix += "; on the command line --batch 2 --sequence 16"
        problems.append(Problem("example_inputs", cause, fix))
    return problems


def wrong_for_stages(subject: LocalModel) -> Iterator[Problem]:
    """Iterate over what an export cannot hold: ranks along ``tensor`` have one graph, and generators stand outside it."""
    for spec in subject.tree.values():
        if any(not shard.is_even(spec.orig_shape[shard.axis], subject.mesh) for shard in spec.shards):
            cause = "its parts differ in size from rank to rank, and a stage has one graph for all of them"
            yield Problem(spec.path, cause, "Split it evenly: pad it, or split it over fewer ranks", spec.type)
    for step in subject.layout:
        if isinstance(step, ForkRng) and not any(f"{step.module}.".startswith(f"{leaf}.") for leaf in subject.leaves):
            cause = "its random numbers differ from rank to rank, which the graph of a stage cannot say"
            yield Problem(step.module, cause, f"Let it run as it is: sch.at[{step.module!r}].leaf()")


def cut(sch: Declaration, subject: LocalModel) -> Partition:
    """Return the stages that a schedule declares.

    Raises:
        PlanError: If the model cannot be cut like this.
    """
    if sch.handed:
        return chain(subject, sch.handed)
    cuts = even_cuts(subject, sch.even) if sch.even else sch.cuts
    changed = {step.module for step in subject.layout}
    if is_sequence(subject.model, cuts) and "" not in changed:
        return chain(subject, slices(subject.model, cuts))
    return partition(subject, cuts)


def place(tree: SpecTree, found: Partition) -> SpecTree:
    """Return the tensors with the stages that hold them: the first owns it, the others hold copies."""
    return tree.map(lambda spec: evolve(spec, stage=found.holders[spec.path][0], also_on=found.holders[spec.path][1:]))


def tied_across(mesh: Mesh, tree: SpecTree) -> list[SumTied]:
    """Return the trained tensors that several places along ``pipe`` hold."""
    return [
        SumTied(spec.path, spec.places(mesh))
        for spec in tree.values()
        if spec.kind == "parameter" and spec.requires_grad and len(spec.places(mesh)) > 1
    ]


def _left_out(sch: Declaration) -> list[Problem]:
    """Return the tensors that no stage holds, where the stages were handed over."""
    paths = [path for stage in sch.handed for path in stage]
    prefixes = tuple(f"{path}." if path else "" for path in paths)
    cause = "it is in none of the stages that were handed over"
    return [
        Problem(spec.path, cause, "Hand over a module that holds it", spec.type)
        for spec in (sch.tree.values() if paths else ())
        if not any(path.startswith(prefixes) for path in spec.paths)
    ]
