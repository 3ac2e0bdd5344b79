"""How ZeRO cuts parameters into partitions, and gradients into buckets; by the code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..accounting.local_parameters import LocalParameter, total_numel

if TYPE_CHECKING:
    from .config import Zero

_ALIGNMENT = 2
"""Elements at whose multiples each partition begins: ``nccl_start_alignment_factor`` in runtime/zero/stage_1_and_2.py and
runtime/bf16_optimizer.py."""


def flat_numel(trained: Sequence[LocalParameter], num_ranks: int) -> int:
    """Return the elements of ZeRO 1 and 2's flat buffer of the trained parameters, with the padding at its end."""
    multiple = _ALIGNMENT * num_ranks
    return -(-total_numel(trained) // multiple) * multiple


def partition_numel(numel: int, num_ranks: int) -> int:
    """Return the elements of one rank's partition of a parameter under ZeRO 3, which pads each parameter on its own.

    ``_padding_size`` in runtime/zero/partition_parameters.py.
    """
    return -(-numel // num_ranks)


def persistent(zero: Zero, parameters: Sequence[LocalParameter]) -> list[LocalParameter]:
    """Return the parameters that ZeRO 3 keeps whole.

    ``mark_persistent_parameters`` in runtime/zero/parameter_offload.py.
    """
    kept: list[LocalParameter] = []
    for parameter in parameters:
        limit = zero.most_persistent_numel
        if parameter.numel <= zero.persistent_numel and (limit is None or parameter.numel + total_numel(kept) <= limit):
            kept.append(parameter)
    return kept


def closed_after(numels: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Iterate over buckets that are sent once they hold more than ``limit`` elements.

    ``allreduce_no_retain`` in runtime/engine.py.

    >>> list(closed_after([3, 3, 3, 1], 5))
    [[3, 3], [3, 1]]
    """
    bucket: list[int] = []
    for numel in numels:
        bucket.append(numel)
        if sum(bucket) > limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def closed_before(numels: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Iterate over buckets that are sent before they would hold more than ``limit`` elements; larger gradients alone.

    ``reduce_independent_p_g_buckets_and_remove_grads`` in runtime/zero/stage_1_and_2.py and stage3.py.

    >>> list(closed_before([3, 3, 3, 9, 1], 6))
    [[3, 3], [3], [9], [1]]
    """
    bucket: list[int] = []
    for numel in numels:
        if bucket and sum(bucket) + numel > limit:
            yield bucket
            bucket = []
        bucket.append(numel)
    if bucket:
        yield bucket
