"""How runtimes cut gradients into messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def closed_after(numels: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Iterate over buckets that are sent once they hold more than ``limit`` elements.

    ``allreduce_no_retain`` in runtime/engine.py of DeepSpeed 0.19.8.

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
    """Iterate over buckets that are sent before they would hold more than ``limit`` elements; a larger one is alone.

    ``reduce_independent_p_g_buckets_and_remove_grads`` in runtime/zero/stage_1_and_2.py and stage3.py of DeepSpeed 0.19.8.

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
