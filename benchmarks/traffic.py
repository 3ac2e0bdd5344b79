"""Collectives, counted whoever calls them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts collectives where torch hands them to the process group, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_collectives = 0
        self.sent_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and go on."""
        if func.namespace in ("c10d", "_c10d_functional"):
            self.sent_bytes += _sent(func.name(), args, dist.get_world_size())
            self.num_collectives += 1
        return func(*args, **(kwargs or {}))


def _sent(op: str, args: Any, num_ranks: int) -> int:
    """Return the bytes that leave one rank for another in a collective of all ranks."""
    match op:
        case "c10d::broadcast_" | "c10d::scatter_":
            return sum(tensor.nbytes for tensor in args[0]) * (num_ranks - 1)
        case "c10d::allgather_":
            return sum(tensor.nbytes for tensor in args[1]) * num_ranks * (num_ranks - 1)
        case "c10d::_allgather_base_":
            return args[1].nbytes * num_ranks * (num_ranks - 1)
        case "c10d::allreduce_":
            return sum(tensor.nbytes for tensor in args[0]) * 2 * (num_ranks - 1)
        case "c10d::barrier":
            return 0
    msg = f"it is not known what {op} sends"
    raise NotImplementedError(msg)
