"""Parts of tensors: the entries that an index, several intervals on each axis, picks out of a whole tensor."""

from __future__ import annotations

import numpy as np
import torch


def entries(intervals):
    """Return the entries of an axis that intervals cover, in order."""
    return [at for interval in intervals for at in range(*interval)]


def picked(index):
    """Return the index tensors that read or write a part of a tensor: ``tensor[picked(index)]``."""
    num = len(index)
    places = [torch.tensor(entries(intervals), dtype=torch.int64) for intervals in index]
    return tuple(at.view([-1 if axis == own else 1 for axis in range(num)]) for own, at in enumerate(places))


def one_interval(*bounds):
    """Return the index of a part that is one interval of each axis."""
    return tuple(((start, stop),) if stop > start else () for start, stop in bounds)


def without_padding(part, index):
    """Return the shard that a rank holds, without its padding, which must be zero."""
    num = len(entries(index[0])) if index else 0
    assert not index or not part[num:].any(), "padding is zero"
    return part[:num] if index else part


def by_hand(shard, size, num):
    """Return the entries of an axis that each of ``num`` ranks holds, by cutting arrays: slow, and nothing like the code."""
    axis = np.arange(size)
    if num == 1:
        return [axis]
    if shard.pad_to_multiple > 1:
        padded = np.arange(-(-size // shard.pad_to_multiple) * shard.pad_to_multiple)
        return [part[part < size] for part in np.split(padded, num)]
    groups = np.split(axis, shard.interleaved)
    if shard.interleaved % num == 0:
        return [np.concatenate(own) for own in np.array_split(np.array(groups), num)]
    sharing = num // shard.interleaved
    return [_of_group(shard, groups[rank // sharing], sharing)[rank % sharing] for rank in range(num)]


def _of_group(shard, group, num):
    by_block = [
        _of_block(shard, block.reshape(-1, shard.granule), num)
        for block in np.split(group, np.cumsum(shard.blocks)[:-1] if shard.blocks else [])
    ]
    return [np.concatenate([parts[rank].reshape(-1) for parts in by_block]) for rank in range(num)]


def _of_block(shard, granules, num):
    count = len(granules)
    if shard.replicate and count < num:
        return [granules[[at]] for at in np.repeat(np.arange(count), num // count)]
    parts = [part.numpy() for part in torch.from_numpy(granules).chunk(num)]
    return [*parts, *[granules[:0]] * (num - len(parts))]
