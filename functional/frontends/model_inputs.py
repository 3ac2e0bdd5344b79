"""Inputs of a model with random values, told from its configuration and its forward's signature, and tried."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...specs.errors import PlanError
from ..layout.trial_run import TrialRun
from ..model.input_candidates import Candidates, with_no_cache

_MOST_ELEMENTS = 30_000_000
"""Elements of the largest model that is tried with values; a larger one runs on fake tensors."""

_BATCH = 3
_LENGTH = 11


def made_inputs(model: nn.Module, batch: int = _BATCH, length: int = _LENGTH, seed: int = 0) -> dict[str, Any] | None:
    """Return inputs with random values with which a model runs; None if none are found.

    Token numbers are below the vocabulary and stand for no image or padding; images and sounds have the sizes that the
    configuration names. The global generators stay as they are.

    Args:
        model: A model with a configuration, also on the meta device; or one whose forward takes ``input_ids``, or one tensor
            that fits one of its first modules.
        batch: Rows of each input.
        length: Tokens of each row, beside those that stand for an image.
        seed: Seed of the values.

    >>> from transformers import GPT2Config, GPT2Model
    >>> inputs = made_inputs(GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=70)))
    >>> {name: list(value.shape) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    {'use_cache': False, 'input_ids': [3, 11]}
    """
    return _tried(model, batch, length, seed)[0]


def why_no_inputs(model: nn.Module) -> str:
    """Return why a model does not run with the first inputs that are made for it; empty if some inputs are right."""
    return _tried(model, _BATCH, _LENGTH, 0)[1]


def _tried(model: nn.Module, batch: int, length: int, seed: int) -> tuple[dict[str, Any] | None, str]:
    """Return inputs with which a model runs, or None and why the first candidate does not."""
    try:
        num = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        trial = TrialRun(model, with_values=num <= _MOST_ELEMENTS)
    except PlanError as error:
        return None, str(error)
    cause = ""
    for candidate in Candidates(model, batch, length, torch.Generator().manual_seed(seed)).all(trial):
        inputs = with_no_cache(model, candidate)
        try:
            trial(inputs)
        except Exception as error:  # noqa: BLE001  the model's code may raise anything; the next candidate is tried
            lines = str(error).splitlines()
            cause = cause or f"{type(error).__name__}: {lines[0] if lines else ''}"
        else:
            return inputs, ""
    return None, cause or "its forward takes nothing that is known"
