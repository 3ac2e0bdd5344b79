"""A schedule for a model without a declared plan, inferred from its operations.

The model is exported on fake tensors, and each axis of each tensor is followed through the operators as a product of
factors (``factors.py``, ``related_axes.py``, ``propagate.py``). A factor that linear modules make, that nothing mixes, and
that other linear modules sum over, such as the heads of an attention or the features of an MLP, is split over ``tensor``
(``regions.py``). The graph of a rank is exported too: unless it is the same graph with local shapes, the region stays whole
(``local_sizes.py``); and so it does where the types of activations show that the ranks would compute something else
(``fit.py``). No module and no attribute is known by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ....specs.errors import PlanError, Problem
from ....specs.mesh import Mesh
from ....specs.verb_call import VerbCall
from ...layout.local_model import LocalModel
from ...model.input_candidates import with_no_cache
from ...schedule import Schedule, create_schedule
from ..verb_calls import apply_all
from .dropouts import without_mixed_dropouts
from .export import ExportFailure, RankGraph, export_rank
from .fit import Choice, Inference, fit
from .inputs import inferred_inputs
from .propagate import ModelAxes, propagate
from .reasons import reasons
from .regions import find_regions
from .vocabularies import find_vocabularies


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
    choice = Choice()
    if mesh.tensor > 1:
        choice = Choice(without_mixed_dropouts(found, find_regions(found, mesh.tensor)), *find_vocabularies(sch, found))
    fitted = fit(Inference(sch, found, traced.training, inputs), choice)
    whys = reasons(sch, found, fitted.choice.outcomes, fitted.choice.tables, fitted.choice.small)
    alone = "whole: there is one rank along tensor"
    return apply_all(
        fitted.schedule,
        [VerbCall(path, "tag", (), (("why", why if mesh.tensor > 1 else alone),)) for path, why in whys.items()],
    )


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
