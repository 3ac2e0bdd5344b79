"""The error of code around an executed module that would train something else than the model."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """What code around an executed module does would train something else than the model, without a word."""
