"""The same random numbers on ranks that hold parts of one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..model.rng_state import own_generators


@contextmanager
def same_draws(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """Let all ranks of a group draw alike within the block, with a seed that the first of them draws.

    Args:
        group: The group along ``tensor``, each rank of which enters; None for this rank alone.
        device: Where its messages and draws are.
    """
    seed = torch.randint(2**62, (), dtype=torch.int64).to(device)
    if group is not None:
        dist.broadcast(seed, dist.get_process_group_ranks(group)[0], group=group)
    with own_generators(int(seed), device):
        yield
