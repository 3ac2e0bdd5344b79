"""A schedule for a model without a declared plan, inferred from its operations.

The model is exported on fake tensors, and each axis of each tensor is followed through the operators as a product of
factors (``factors.py``, ``operator_rules.py``, ``propagate.py``). A factor that linear modules make, that nothing mixes, and
that other linear modules sum over, such as the heads of an attention or the features of an MLP, is split over ``tensor``
(``regions.py``). The graph of a rank is exported too: unless it is the same graph with local shapes, the region stays whole
(``local_sizes.py``). No module and no attribute is known by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen
from torch import Tensor, nn

from ....specs.errors import PlanError, Problem
from ....specs.mesh import Mesh
from ...layout.local_model import LocalModel
from ...schedule import Schedule, create_schedule
from ..verb_calls import VerbCall, apply_all
from .dropouts import random_number_calls, without_mixed_dropouts
from .export import ExportFailure, RankGraph, export_rank
from .inputs import inferred_inputs, with_no_cache
from .local_sizes import SizeAttributes, first_difference, kind_to_change, local_shapes, size_attributes
from .propagate import ModelAxes, propagate
from .reasons import reasons
from .regions import Outcome, RefusedRegion, Region, find_regions
from .vocabularies import Vocabulary, find_vocabularies

_MOST_TRIED = 64
"""Limit of the exports that are tried before the remaining regions stay whole."""


def infer_schedule(model: nn.Module, mesh: Mesh, *, example_inputs: Mapping[str, Any] | None = None) -> Schedule:
    """Return a schedule that splits attention, MLPs and vocabularies over ``tensor``, as far as their operations allow it.

    Each tensor has a tag ``why`` with the reason of its split, or of staying whole. Tensors without a certain split stay
    whole.

    Args:
        model: The model, best built under ``torch.device("meta")``.
        mesh: The ranks.
        example_inputs: Tensors by the names of the model's arguments, also on the meta device; their sizes do not matter.
            Left out, they are told from the model's configuration.

    Raises:
        PlanError: If the model cannot be exported, or inputs are needed.

    >>> import torch
    >>> from torch import nn
    >>> from shardplan.specs import Mesh
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> sch = infer_schedule(model, Mesh(tensor=2), example_inputs={"input": torch.empty(4, 8)})
    >>> for spec in sch.tree.values():
    ...     print(spec)
    0.weight  f32[32@tensor, 8]
    0.bias  f32[32@tensor]
    2.weight  f32[8, 32@tensor]
    2.bias  f32[8]
    """
    sch = create_schedule(model, mesh)
    if sch.problems:
        return sch
    inputs = inferred_inputs(model) if example_inputs is None else with_no_cache(model, example_inputs)
    found, traced = _model_axes(sch, inputs)
    outcomes = without_mixed_dropouts(found, find_regions(found, mesh.tensor)) if mesh.tensor > 1 else []
    tables, small = find_vocabularies(sch, found) if mesh.tensor > 1 else ([], {})
    fitted = _fit(Inference(sch, found, traced.training, inputs, tuple(tables)), outcomes)
    whys = reasons(sch, found, fitted.outcomes, tables, small)
    split = apply_all(fitted.schedule, random_number_calls(found, fitted.outcomes))
    alone = "whole: there is one rank along tensor"
    return apply_all(
        split, [VerbCall(path, "tag", (), (("why", why if mesh.tensor > 1 else alone),)) for path, why in whys.items()]
    )


@frozen(eq=False)
class Inference:
    """The axes of a model, before any split.

    Args:
        schedule: A schedule without declarations.
        found: The axes of the model.
        training: Whether the model was exported as it runs in training.
        inputs: The inputs of the export.
        tables: Tables whose rows are split.
    """

    schedule: Schedule
    found: ModelAxes
    training: bool
    inputs: Mapping[str, Any]
    tables: tuple[Vocabulary, ...]


@frozen(eq=False)
class Fitted:
    """Splits with which each rank computes its part.

    Args:
        schedule: The schedule with these splits.
        outcomes: Regions that are split, and regions that stay whole.
    """

    schedule: Schedule
    outcomes: tuple[Outcome, ...]


def _split(outcomes: Iterable[Outcome]) -> list[Region]:
    return [outcome for outcome in outcomes if isinstance(outcome, Region)]


def _model_axes(sch: Schedule, inputs: Mapping[str, Any]) -> tuple[ModelAxes, RankGraph]:
    alone = LocalModel(sch.runtime.model, Mesh(), sch.tree, example_inputs=inputs)
    traced: RankGraph | ExportFailure | None = None
    for training in (True, False):
        again = export_rank(alone, training=training)
        if isinstance(again, RankGraph):
            return propagate(sch, again), again
        traced = traced or again
    assert isinstance(traced, ExportFailure), "neither was exported"
    given = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor))
    cause = f"the model is exported to see what it computes, with {given}, and that stops here: {traced.cause}"
    raise PlanError([Problem(traced.path, cause, "Give other example_inputs, or split it with the verbs")])


def _fit(known: Inference, outcomes: Sequence[Outcome]) -> Fitted:
    """Return splits and local sizes of attributes with which a rank's graph is the model's graph at local shapes."""
    mesh = known.schedule.mesh
    tried = 0
    while True:
        regions = _split(outcomes)
        shapes = local_shapes(regions, mesh.tensor)
        kinds = size_attributes(known.found, regions, shapes)
        changed = {path for region in regions for path in region.modules}
        changed |= {path for table in known.tables for path in (*table.embeddings, *table.heads)}
        while True:
            sch = apply_all(known.schedule, _verb_calls(known, regions, kinds))
            if not regions and not known.tables:
                return Fitted(sch, tuple(outcomes))
            tried += 1
            if sch.problems:
                rank = ExportFailure(sch.problems[0].path, sch.problems[0].cause)
            else:
                split = LocalModel(sch.runtime.model, mesh, sch.tree, sch.layout, example_inputs=known.inputs)
                rank = export_rank(split, training=known.training)
            wrong = first_difference(known.found, rank, shapes, changed)
            if wrong is None:
                return Fitted(sch, tuple(outcomes))
            kind = kind_to_change(kinds, wrong)
            if kind is None or tried > _MOST_TRIED:
                break
            kind.at += 1
        outcomes = _without(outcomes, wrong, rank)


def _without(outcomes: Sequence[Outcome], path: str, rank: RankGraph | ExportFailure) -> list[Outcome]:
    """Return the outcomes with the regions of a path whole; with all regions whole if the path belongs to none."""
    told = f": {rank.cause}" if isinstance(rank, ExportFailure) else ""
    reason = f"no local sizes were found with which {path or 'the model'} would compute its part{told}"
    near = [r for r in _split(outcomes) if path in r.modules or path in {op.module for op in r.operations}]
    gone = near or _split(outcomes)
    return [RefusedRegion(o.modules, reason) if isinstance(o, Region) and o in gone else o for o in outcomes]


def _verb_calls(known: Inference, regions: Iterable[Region], kinds: Iterable[SizeAttributes]) -> Iterator[VerbCall]:
    for table in known.tables:
        yield from (VerbCall(path, "vocab_parallel") for path in table.embeddings)
        yield from (VerbCall(path, "colwise", (), (("gather_output", True),)) for path in table.heads)
    for region in regions:
        yield from (VerbCall(path, "colwise", (), tuple(split.items())) for path, split in region.columns.items())
        yield from (VerbCall(path, "rowwise", (), tuple(split.items())) for path, split in region.rows.items())
        for path, (axis, split) in region.tensors.items():
            yield VerbCall(path, "shard", (), (("axis", axis), *split.items()))
        yield from (VerbCall(path, "sum_gradient") for path in region.sums.parameters)
        for path, features in region.sums.outputs:
            some = (("features", features),) if any(features) else ()
            yield VerbCall(path, "sync", ("backward_pre", "all_reduce"), some)
    for kind in kinds:
        if kind.values:
            yield from (VerbCall(path, "set", (), tuple(kind.values.items())) for path in kind.modules)
