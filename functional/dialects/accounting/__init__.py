"""Records and helpers for the memory and messages of training, shared by dialects."""

from .local_parameters import LocalParameter, backward_order, local_parameters, total_bytes, total_numel
from .messages import Messages, crossings, tied_sums
from .state import State, whole_state
from .training import Optimizer, Training, named_optimizer

__all__ = [
    "LocalParameter",
    "Messages",
    "Optimizer",
    "State",
    "Training",
    "backward_order",
    "crossings",
    "local_parameters",
    "named_optimizer",
    "tied_sums",
    "total_bytes",
    "total_numel",
    "whole_state",
]
