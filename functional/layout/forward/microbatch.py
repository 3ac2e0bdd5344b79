"""One forward and one backward pass at local shapes, on fake tensors: what they send and leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ....specs.microbatch import Microbatch
from ....specs.steps import DispatchTokens, SumGradient, Sync
from ...model.fake_values import DependsOnValuesError
from ..local_model import LocalModel, following
from .collective_counts import SyncCalls
from .run_once import Shortcut
from .saved_activations import Kept

if TYPE_CHECKING:
    from ....specs.steps import LayoutStep
    from ....specs.tree import SpecTree


def follow_microbatch(subject: LocalModel) -> Microbatch | None:
    """Return what one micro-batch of the first rank sends and leaves behind; None if it cannot be followed without values.

    The passes are those of CPU tensors: an operator whose kernel for another device keeps something else is counted as here.
    The backward pass begins with all outputs that have a gradient. What a function of the user's sends by itself, as the
    operator of a synchronisation, is not seen.

    Args:
        subject: The model with example inputs in which ``check_forward`` has found no problem. It is in training where the
            user's model is.

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
    """Follow a micro-batch, of repeated layers two with ``once``; return None where that is not possible."""
    tree, layout = subject.tree, subject.layout
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    local = subject.fake_copy(mode, numbered=True)
    num_calls: Counter[str] = Counter()
    shortcut, calls = Shortcut(layout, tree, num_calls), SyncCalls(layout)
    with following(mode), torch.enable_grad():
        if once:
            shortcut.watch(subject.model, local)
        for path, module in local.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(partial(_count, num_calls, path))
        kept = Kept(local)
        shortcut.settle(local)
        try:
            with calls("forward"), kept:
                outputs = local(**subject.fake_inputs())
            if once and not _is_told_by_others(shortcut, layout, kept):
                return None
            with calls("backward"):
                has_gradient = _backward(outputs, local, tree)
        except DependsOnValuesError:
            return None
        except Exception as error:  # the model's code may raise anything, and only with gradients does it
            if _is_a_bug(error):
                raise
            return None
    if once and not shortcut.is_sound:  # a checkpoint computes a layer again
        return None
    sent = [evolve(c, module=module) for c in calls.found() for module in (c.module, *shortcut.alike(c.module))]
    places = {step.module: place for place, step in enumerate(layout)}
    sent.sort(key=lambda call: (call.direction == "backward", places[call.module]))
    told_by = {other: path for path in has_gradient for other in shortcut.alike(path)}
    without = tuple(path for path in has_gradient if not has_gradient[told_by.get(path, path)])
    return Microbatch(tuple(sent), tuple(kept.found(shortcut.repeated)), without)


def _count(num_calls: Counter[str], path: str, *_: object) -> None:
    num_calls[path] += 1


def _is_told_by_others(shortcut: Shortcut, layout: Sequence[LayoutStep], kept: Kept) -> bool:
    """Tell whether all that is recorded of a layer that did not run is recorded of the one that stands for it.

    Nothing goes back through what stands around such a layer, nor through what runs between it and the one that stands for
    it: there must be nothing.
    """
    around = {step.module for step in layout if isinstance(step, (Sync, SumGradient, DispatchTokens))}
    told_by = dict(shortcut.repeated)
    follow_theirs = all(
        told_by.get(before, before) == told_by[path] for before, path in pairwise(kept.order) if path in told_by
    )
    return shortcut.is_sound and follow_theirs and told_by.keys() <= set(kept.blocks) - around


def _backward(outputs: Any, local: nn.Module, tree: SpecTree) -> dict[str, bool]:
    """Go back from the sum of all outputs that have a gradient; return which trained tensors have one then.

    No tensor keeps its gradient: what stands in plain attributes, or in scripted modules, is the user's own.
    """
    roots = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    trained = {tree[path].path: p for path, p in local.named_parameters() if p.requires_grad and path in tree}
    if not roots or not trained:
        return dict.fromkeys(trained, False)
    ones = [torch.ones_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, list(trained.values()), ones, allow_unused=True)
    return {path: gradient is not None for path, gradient in zip(trained, gradients, strict=True)}


def _is_a_bug(error: Exception) -> bool:
    """Tell whether it is this package's own code that raises an error: what the model does wrong was reported before."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(f"{__package__}.")
