"""Follow a forward and a backward pass at local shapes, on fake tensors: the traffic, and the activations saved."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ....specs.layout_steps import DispatchTokens, SumGradient, SumProducts, Sync
from ....specs.microbatch import Microbatch
from ...model.fake_values import DependsOnValuesError
from ...model.known_values import KnownValues
from ...model.open_modules import OpenModules
from ..local_model import LocalModel, following
from .collective_counts import CollectiveCounts
from .run_once import SkippedLayers
from .saved_activations import SavedActivations

if TYPE_CHECKING:
    from ....specs.layout_steps import LayoutStep
    from ....specs.tree import SpecTree


def follow_microbatch(subject: LocalModel) -> Microbatch | None:
    """Return the traffic and the saved activations of a micro-batch of the first rank; None if it depends on values.

    The passes run CPU kernels: an operator whose kernel for another device saves other tensors is counted as on the CPU.
    The backward pass begins with all outputs that have a gradient. Communication by a function of the user's own, as the
    operator of a synchronisation, is not counted.

    Args:
        subject: The model, with example inputs with which the rank's forward pass runs. Its copy trains the modules
            that train in the user's model.

    >>> from shardplan.functional import create_schedule
    >>> from shardplan.specs import Mesh
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> sch = create_schedule(model, Mesh(tensor=2)).at["0"].colwise().at["2"].rowwise()
    >>> example_inputs = {"input": torch.empty(4, 8, device="meta")}
    >>> found = follow_microbatch(LocalModel(model, sch.mesh, sch.tree, sch.layout, example_inputs=example_inputs))
    >>> [(call.module, call.direction, call.op, call.num_bytes) for call in found.calls]
    [('2', 'forward', 'all_reduce', 128)]
    """
    with torch.inference_mode(mode=False):
        return _followed(subject, once=True) or _followed(subject, once=False)


def _followed(subject: LocalModel, *, once: bool) -> Microbatch | None:
    """Follow a micro-batch, with ``once`` only two of repeated layers; return None where that is not possible."""
    tree, layout = subject.tree, subject.layout
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    local = subject.fake_copy(mode, numbered=True)
    running, counts = OpenModules(), CollectiveCounts(layout)
    layers = SkippedLayers(layout, tree, running.num_calls)
    with following(mode, values := KnownValues()), torch.enable_grad():
        if once:
            layers.watch(subject.model, local)
        running.follow(local)
        saved = SavedActivations(local)
        layers.settle(local)
        try:
            with counts("forward"), saved:
                outputs = local(**subject.fake_inputs(values))
            if once and not _represented(layers, layout, saved):
                return None
            with counts("backward"):
                has_gradient = _backward(outputs, local, tree)
        except DependsOnValuesError:
            return None
        except Exception as error:  # the model's code may raise any error, and some only with gradients
            if _is_a_bug(error):
                raise
            return None
    if once and not layers.is_sound:  # a checkpoint computes a layer again
        return None
    sent = [evolve(c, module=module) for c in counts.calls() for module in (c.module, *layers.repeats_of(c.module))]
    places = {step.module: place for place, step in enumerate(layout)}
    sent.sort(key=lambda call: (call.direction == "backward", places[call.module]))
    representative_of = {repeat: path for path in has_gradient for repeat in layers.repeats_of(path)}
    without = tuple(path for path in has_gradient if not has_gradient[representative_of.get(path, path)])
    return Microbatch(tuple(sent), tuple(saved.found(layers.representative_of)), without)


def _represented(layers: SkippedLayers, layout: Sequence[LayoutStep], saved: SavedActivations) -> bool:
    """Tell whether the record of each representative is complete for the layers that were skipped for it.

    The backward pass does not run through hooks around a skipped layer, nor through operations between it and its
    representative: there must be none.
    """
    hooked = {step.module for step in layout if isinstance(step, (Sync, SumGradient, SumProducts, DispatchTokens))}
    representative_of = layers.representative_of
    follow_directly = all(
        representative_of.get(before, before) == representative_of[path]
        for before, path in pairwise(saved.order)
        if path in representative_of
    )
    return layers.is_sound and follow_directly and representative_of.keys() <= set(saved.blocks) - hooked


def _backward(outputs: Any, local: nn.Module, tree: SpecTree) -> dict[str, bool]:
    """Run the backward pass from all outputs that have a gradient; tell for each trained tensor whether it gets a gradient.

    No gradient is stored: tensors in plain attributes, and in scripted modules, are the user's own.
    """
    roots = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    trained = {tree[path].path: p for path, p in local.named_parameters() if p.requires_grad and path in tree}
    if not roots or not trained:
        return dict.fromkeys(trained, False)
    ones = [torch.ones_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, list(trained.values()), ones, allow_unused=True)
    return {path: gradient is not None for path, gradient in zip(trained, gradients, strict=True)}


def _is_a_bug(error: Exception) -> bool:
    """Tell whether this package's own code raised an error; errors of the model's code were reported before."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(f"{__package__}.")
