"""Whether a way gives the same weights whatever the number of ranks, found by putting shards together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import frozen
from models import tensors
from sample import Job, look
from ways import plan_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from models import Case
    from numpy.typing import NDArray
    from sample import Parts

NUM_RANKS = (1, 2, 4)


@frozen
class Sameness:
    """What came of the comparison, on a tiny model.

    Args:
        num_tensors: Tensors that were compared.
        num_same: Those that are bit for bit the same on 1, 2 and 4 ranks.
        num_random: Split tensors whose values are not all equal.
        num_twins: Those of which two ranks hold the same values, on any number of ranks.
    """

    num_tensors: int
    num_same: int
    num_random: int
    num_twins: int


def compare(case: Case, way: str) -> Sameness:
    """Run a way on 1, 2 and 4 ranks and compare the weights that the shards make together."""
    worlds = [look(Job(way, case, plan_for(case, num_ranks, way)), num_ranks) for num_ranks in NUM_RANKS]
    wholes = [_put_together(case, ranks) for ranks in worlds]
    paths = list(wholes[0])
    same = [path for path in paths if len({whole[path] for whole in wholes}) == 1]
    random = [path for path, (part, axis) in worlds[1][0].items() if axis is not None and np.unique(part).size > 1]
    twins = [path for path in random if any(_are_twins(ranks, path) for ranks in worlds)]
    return Sameness(len(paths), len(same), len(random), len(twins))


def _put_together(case: Case, ranks: Sequence[Parts]) -> Mapping[str, bytes]:
    sizes = {path: tensor.nbytes for path, tensor in tensors(case.model).items()}
    return {path: _whole(ranks, path, sizes[path]) for path in ranks[0]}


def _whole(ranks: Sequence[Parts], path: str, num_bytes: int) -> bytes:
    """Return the bytes of a whole tensor; of one that should be equal on all ranks and is not, those of all ranks."""
    parts: list[NDArray[np.generic]] = [rank[path][0] for rank in ranks]
    axis = ranks[0][path][1]
    if axis is None:
        return b"".join(sorted({part.tobytes() for part in parts}))
    return np.concatenate(parts, axis).tobytes()[:num_bytes]  # what pads the last rank's part is cut off


def _are_twins(ranks: Sequence[Parts], path: str) -> bool:
    return len({rank[path][0].tobytes() for rank in ranks}) < len(ranks)
