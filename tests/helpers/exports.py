"""Exports of one model are made once by processes that plan it several times: ``torch.export`` takes seconds each time."""

from __future__ import annotations

from functools import wraps

import torch

from shardplan.functional.pipeline import partition


def share_exports():
    """Let this process, and those that it forks, export a model once for all plans that split its tensors alike."""
    capture, found = partition.capture, {}

    @wraps(capture)
    def remembered(subject, *, training):
        key = (training, _key(subject))
        if key not in found:
            found[key] = capture(subject, training=training)
        return found[key]

    partition.capture = remembered


def _key(subject):
    """Return all that an export depends on: modules, their code and settings, local tensors, changes of layout, inputs."""
    first = subject.mesh.coordinate(0)
    modules = [(path, type(module), module.extra_repr(), module.training) for path, module in subject.model.named_modules()]
    tensors = [
        (spec.paths, spec.local_shape(first), spec.dtype, spec.kind, spec.requires_grad) for spec in subject.tree.values()
    ]
    inputs = [
        (name, (value.shape, value.dtype) if isinstance(value, torch.Tensor) else repr(value))
        for name, value in (subject.example_inputs or {}).items()
    ]
    config = str(getattr(subject.model, "config", None))
    sizes = (subject.mesh.data, subject.mesh.tensor, subject.mesh.expert) if subject.layout else ()
    callables = [(name, id(function)) for name, function in subject.callables.items()]
    return repr((modules, tensors, inputs, config, sizes, subject.layout, subject.leaves, callables))
