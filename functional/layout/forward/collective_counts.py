"""Count the collectives that synchronisations issue while a model runs on fake tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ....specs.layout_steps import DispatchTokens, SumGradient, SumProducts, Sync
from ....specs.microbatch import SyncCall
from ..collectives import sent_by

if TYPE_CHECKING:
    from ....specs.layout_steps import LayoutStep
    from ....specs.mesh import MeshAxis
    from ....specs.traffic import Cargo

_Direction = Literal["forward", "backward"]


class CollectiveCounts(TorchDispatchMode):
    """Count collectives by the layout step that issues them.

    The groups of the model are named after these steps, and an operator's backward pass uses the group of its forward
    pass: so the name of the group tells the step.

    Args:
        layout: The layout steps; the groups are numbered by their places in this list.
    """

    def __init__(self, layout: Sequence[LayoutStep]) -> None:
        super().__init__()
        self._layout = layout
        self._direction: _Direction = "forward"
        self._num_calls: Counter[tuple[str, _Direction, str, MeshAxis, Cargo]] = Counter()
        self._num_bytes = self._num_calls.copy()

    @contextmanager
    def __call__(self, direction: _Direction) -> Iterator[None]:
        """Count the collectives within the block for a direction."""
        self._direction = direction
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # autograd asks it of each gradient, several times
            return args[0].fake_device
        if func.namespace == "shardplan" and (sent := sent_by(func._schema.name, args)):  # noqa: SLF001  the operator's name
            op, num_bytes = sent
            step = self._layout[int(args[-1].rpartition("#")[2])]
            assert isinstance(step, (Sync, SumGradient, SumProducts, DispatchTokens)), f"{type(step).__name__} sends nothing"
            cargo: Cargo = "gradients" if isinstance(step, SumGradient) else "activations"
            key = (step.module, self._direction, op, step.mesh_axis, cargo)
            self._num_calls[key] += 1
            self._num_bytes[key] += num_bytes
        return func(*args, **(kwargs or {}))

    def calls(self) -> Iterator[SyncCall]:
        """Iterate over the collectives, in the order in which they were issued first."""
        for key, num_calls in self._num_calls.items():
            module, direction, op, mesh_axis, cargo = key
            yield SyncCall(module, direction, op, mesh_axis, num_calls, self._num_bytes[key], cargo)
