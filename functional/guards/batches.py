"""Whether the ranks along ``tensor`` are given the same batch, by a digest of each argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .error import TrainingError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (bool, int, float, str, type(None))


def check_alike(arguments: Mapping[str, Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare the arguments of a call over a group: one ``all_reduce`` of 16 bytes, and a gather if they differ.

    Args:
        arguments: What the module is called with, by name.
        group: The group along ``tensor``; each rank calls this.
        device: Where its messages are.

    Raises:
        TrainingError: On each rank of the group, if they differ.
    """
    digests = {name: _digest(value, device) for name, value in arguments.items()}
    both = torch.stack([total := sum(digests.values(), torch.zeros((), dtype=torch.int64, device=device)) >> 2, -total])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    if int(both.sum()) == 0:
        return
    found: list[Any] = [None] * dist.get_world_size(group)
    told = {name: (int(digest), _shape(arguments[name])) for name, digest in digests.items()}
    dist.all_gather_object(found, told, group=group)
    names = [
        name for name in dict.fromkeys(n for each in found for n in each) if len({each.get(name) for each in found}) > 1
    ]
    shapes = {name: [each[name][1] if name in each else "none" for each in found] for name in names}
    which = ", ".join(f"{name} ({' and '.join(dict.fromkeys(shapes[name]))})" for name in names)
    ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
    msg = (
        f"ranks {ranks} along tensor hold parts of one model, and are called with different batches: {which} differ. "
        "Share batches out over data alone: DistributedSampler(dataset, num_replicas=plan.mesh.data, "
        "rank=plan.mesh.coordinate(dist.get_rank()).data), and seed all generators alike; execute(check_inputs=0) compares "
        "nothing"
    )
    raise TrainingError(msg)


def _digest(value: Any, device: torch.device) -> Tensor:
    """Return a digest of a value: equal for equal shapes, types and entries, to the last bit."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for place, leaf in enumerate(tree_leaves(value)):
        total = total * 31 + _of_text(_described(leaf), place)
        for entries in _entries(leaf):
            total = total * 31 + _mixed(entries).sum().to(device)
    return total


def _mixed(entries: Tensor) -> Tensor:
    """Return numbers of 64 bits that depend on each entry and its place (SplitMix64, Steele et al. 2014)."""
    mixed = entries + torch.arange(1, entries.numel() + 1, device=entries.device) * 0x1E3779B97F4A7C15
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        mixed = (mixed ^ (mixed >> 30)) * factor
    return mixed ^ (mixed >> 31)


def _entries(leaf: Any) -> Iterator[Tensor]:
    """Yield the bits of a dense tensor's entries, as integers."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_meta and leaf.numel():
        plain = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        plain = plain.detach().reshape(-1)
        yield plain.contiguous().view(_INTEGERS[plain.element_size()]).to(torch.int64)


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {tuple(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__qualname__


def _shape(value: Any) -> str:
    leaves = tree_leaves(value)
    return f"{list(leaves[0].shape)}" if len(leaves) == 1 and isinstance(leaves[0], Tensor) else type(value).__name__


def _of_text(text: str, place: int) -> int:
    return int.from_bytes(blake2b(f"{place}:{text}".encode(), digest_size=7).digest(), "little")
