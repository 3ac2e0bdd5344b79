"""A user's functions that synchronise, while planning: there is no process group, and a stand-in takes their place."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...specs.layout_steps import Sync
    from .collectives import SyncGroup

SyncFunction = Callable[[Tensor, "SyncGroup"], Tensor]
"""A function of the user's that synchronises a tensor over a group."""


def stand_in(step: Sync, function: SyncFunction, note: Callable[[Sync], None] = lambda _: None) -> SyncFunction:
    """Return a function with fake results for a user's function that synchronises.

    If the user says what it gives, it is not called. Else it is, and where it asks torch for a process group, its result
    is a tensor as it takes.

    Args:
        step: Where it is called, and what the user says of it.
        function: The function.
        note: Takes the step when the function could not run.
    """

    def given(x: Tensor, group: SyncGroup) -> Tensor:
        return _as_said(step, x, group.num_ranks)

    def tried(x: Tensor, group: SyncGroup) -> Tensor:
        try:
            return function(x, group)
        except Exception as error:
            if not _is_of_groups(error.__traceback__):
                raise
            note(step)
            return x.clone()

    return given if step.gives is not None else tried


def _as_said(step: Sync, x: Tensor, num: int) -> Tensor:
    """Return a tensor of the shape that follows from what the user says."""
    if step.axis is None or step.when in {"backward_pre", "backward_post"} or step.gives == "summand":
        return x.clone()
    axis = step.axis % x.dim()
    return torch.cat([x] * num, axis) if step.gives == "whole" else x.narrow(axis, 0, x.shape[axis] // num).clone()


def _is_of_groups(trace: TracebackType | None) -> bool:
    """Tell whether code of ``torch.distributed``, or the search for a process group, has raised an error."""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("torch.distributed") or trace.tb_frame.f_code.co_name == "_process_group":
            return True
        trace = trace.tb_next
    return False
