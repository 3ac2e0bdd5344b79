"""How often ZeRO 3 gathers parameters in one micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise


def gathered_in_passes(numels: Mapping[str, int], uses: Iterable[Sequence[str]], reuse_numel: int) -> Iterator[str]:
    """Iterate over the parameters that are gathered in a forward and a backward pass, as often as they are.

    A module's parameters are gathered before it runs, and released after it unless fewer than ``reuse_numel`` elements are
    used before they are used again (``__params_to_release`` in runtime/zero/partitioned_param_coordinator.py of DeepSpeed
    0.19.8, once it has seen a step). Modules are taken to run in the order in which the model names them, and backwards.

    Args:
        numels: Elements of each parameter.
        uses: Parameters of each module that has some, in order.
        reuse_numel: The distance up to which a parameter is kept.

    >>> list(gathered_in_passes({"a": 4, "b": 4}, [["a"], ["b"]], 9))
    ['a', 'b']
    >>> list(gathered_in_passes({"a": 4, "b": 4}, [["a"], ["b"]], 8))
    ['a', 'a', 'b']
    """
    forward = list(uses)
    modules = [*forward, *reversed(forward)]
    before = [0, *accumulate(sum(numels[path] for path in paths) for paths in modules)]
    places: dict[str, list[int]] = {}
    for place, paths in enumerate(modules):
        for path in paths:
            places.setdefault(path, []).append(place)
    for path, used in places.items():
        yield path
        for first, again in pairwise(used):
            # adjacent uses are no exception: with a distance of 0 nothing is looked at, and everything released
            if before[again] - before[first + 1] >= reuse_numel:
                yield path
