"""A schedule for a model that declares nothing, told from what it computes.

The model is exported on fake tensors, and each axis of each tensor is followed through the operators as a product of
factors (``factors.py``, ``axis_rules.py``). A factor that linear modules make, that nothing mixes, and that other linear
modules sum over, such as the heads of an attention or the features of an MLP, is split over ``tensor`` (``regions.py``).
What one rank then runs is exported too: it is the same graph with local shapes, or the region stays whole
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
from ..verb_calls import Saying, say
from .dropouts import forked
from .export import Stopped, Traced, trace
from .inputs import inferred_inputs, with_no_cache
from .local_sizes import Holder, first_difference, holders, local_shapes, responsible
from .propagate import Followed, follow
from .reasons import reasons
from .regions import Refused, Region, find_regions
from .vocabularies import Vocabulary, find_vocabularies

_MOST_TRIED = 64
"""Exports that are tried before what is left stays whole."""


def infer_schedule(model: nn.Module, mesh: Mesh, *, example_inputs: Mapping[str, Any] | None = None) -> Schedule:
    """Return a schedule that splits attention, MLPs and vocabularies over ``tensor``, as far as what they compute allows.

    Each tensor has a tag ``why``: what it is split by, or why it stays whole. Whatever is not certain stays whole.

    Args:
        model: The model, best built under ``torch.device("meta")``.
        mesh: The ranks.
        example_inputs: Tensors by the names of the model's arguments, meta ones will do; their sizes do not matter. Left
            out, they are told from the model's configuration.

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
    found, traced = _followed(sch, inputs)
    outcomes = find_regions(found, mesh.tensor) if mesh.tensor > 1 else []
    tables, small = find_vocabularies(sch, found) if mesh.tensor > 1 else ([], {})
    fitted = _fit(Inference(sch, found, traced.training, inputs, tuple(tables)), outcomes)
    whys = reasons(sch, found, fitted.outcomes, tables, small)
    split = fitted.schedule
    split = say(split, [Saying(path, "fork_rng") for path in forked(found, fitted.regions)])
    alone = "whole: there is one rank along tensor"
    return say(split, [Saying(path, "tag", (), (("why", why if mesh.tensor > 1 else alone),)) for path, why in whys.items()])


@frozen(eq=False)
class Inference:
    """What is known before anything is split.

    Args:
        schedule: It says nothing yet.
        found: The axes of the model.
        training: Whether the model was exported as it runs in training.
        inputs: What it is called with.
        tables: Tables whose rows are split.
    """

    schedule: Schedule
    found: Followed
    training: bool
    inputs: Mapping[str, Any]
    tables: tuple[Vocabulary, ...]


@frozen(eq=False)
class Fitted:
    """Splits with which a rank runs its part.

    Args:
        schedule: It says them.
        outcomes: Regions that are split, and those that are not.
    """

    schedule: Schedule
    outcomes: tuple[Region | Refused, ...]

    @property
    def regions(self) -> list[Region]:
        """The regions that are split."""
        return _split(self.outcomes)


def _split(outcomes: Iterable[Region | Refused]) -> list[Region]:
    return [outcome for outcome in outcomes if isinstance(outcome, Region)]


def _followed(sch: Schedule, inputs: Mapping[str, Any]) -> tuple[Followed, Traced]:
    alone = LocalModel(sch.runtime.model, Mesh(), sch.tree, example_inputs=inputs)
    traced: Traced | Stopped | None = None
    for training in (True, False):
        again = trace(alone, training=training)
        if isinstance(again, Traced):
            return follow(sch, again), again
        traced = traced or again
    assert isinstance(traced, Stopped), "neither was exported"
    given = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor))
    cause = f"the model is exported to see what it computes, with {given}, and that stops here: {traced.cause}"
    raise PlanError([Problem(traced.path, cause, "Give other example_inputs, or split it with the verbs")])


def _fit(known: Inference, outcomes: Sequence[Region | Refused]) -> Fitted:
    """Return splits with attributes set so that one rank's graph is that of the model at local shapes."""
    mesh = known.schedule.mesh
    tried = 0
    while True:
        regions = _split(outcomes)
        shapes = local_shapes(regions, mesh.tensor)
        kinds = holders(known.found, regions, shapes)
        changed = {path for region in regions for path in region.modules}
        changed |= {path for table in known.tables for path in (*table.embeddings, *table.heads)}
        while True:
            sch = say(known.schedule, _sayings(known, regions, kinds))
            if not regions and not known.tables:
                return Fitted(sch, tuple(outcomes))
            tried += 1
            if sch.problems:
                rank = Stopped(sch.problems[0].path, sch.problems[0].cause)
            else:
                split = LocalModel(sch.runtime.model, mesh, sch.tree, sch.layout, example_inputs=known.inputs)
                rank = trace(split, training=known.training)
            wrong = first_difference(known.found, rank, shapes, changed)
            if wrong is None:
                return Fitted(sch, tuple(outcomes))
            kind = responsible(kinds, wrong)
            if kind is None or tried > _MOST_TRIED:
                break
            kind.at += 1
        outcomes = _without(outcomes, wrong, rank)


def _without(outcomes: Sequence[Region | Refused], path: str, rank: Traced | Stopped) -> list[Region | Refused]:
    """Return the outcomes with the regions whole that a path belongs to, all if it belongs to none."""
    told = f": {rank.cause}" if isinstance(rank, Stopped) else ""
    reason = f"no local sizes were found with which {path or 'the model'} would compute its part{told}"
    near = [r for r in _split(outcomes) if path in r.modules or path in {op.module for op in r.operations}]
    gone = near or _split(outcomes)
    return [Refused(o.modules, reason) if isinstance(o, Region) and o in gone else o for o in outcomes]


def _sayings(known: Inference, regions: Iterable[Region], kinds: Iterable[Holder]) -> Iterator[Saying]:
    for table in known.tables:
        yield from (Saying(path, "vocab_parallel") for path in table.embeddings)
        yield from (Saying(path, "colwise", (), (("gather_output", True),)) for path in table.heads)
    for region in regions:
        yield from (Saying(path, "colwise", (), tuple(split.items())) for path, split in region.columns.items())
        yield from (Saying(path, "rowwise", (), tuple(split.items())) for path, split in region.rows.items())
        for path, (axis, split) in region.others.items():
            yield Saying(path, "shard", (), (("axis", axis), *split.items()))
        yield from (Saying(path, "sum_gradient") for path in region.summed)
    for kind in kinds:
        if kind.values:
            yield from (Saying(path, "set", (), tuple(kind.values.items())) for path in kind.modules)
