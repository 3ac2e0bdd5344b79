"""What a rank sends over the boundaries between stages in a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ....specs.dtypes import num_bytes
from .microbatches import num_microbatches
from .records import Reduction

if TYPE_CHECKING:
    from ....specs.mesh import Coordinate
    from ....specs.pipeline import Activation
    from ....specs.plan import Plan


def crossings(plan: Plan, coordinate: Coordinate) -> Iterator[Reduction]:
    """Iterate over what one rank sends to the next stages and back to those before, at the sizes of the example inputs.

    Messages are told apart by the place along ``pipe`` that they go to: that of the next stage, or of the one before. Where
    each place has several stages the last place sends to the first, and back.

    With ``tensor`` DeepSpeed sends a part of the first tensor only, unless it is told not to, and gathers it again along
    ``tensor``: what a stage takes before its forward pass, what it has given and its gradient before its backward pass
    (``_exec_forward_pass`` and ``_exec_backward_pass`` in runtime/pipe/engine.py of 0.19.8). Shapes that DeepSpeed tells
    ahead of tensors, 1 KiB each time, are left out.
    """
    times, last = num_microbatches(plan), len(plan.stages) - 1
    sent: dict[int, list[int]] = {}
    gathered: list[int] = []
    for number in range(coordinate.pipe, len(plan.stages), plan.mesh.pipe):
        outputs = plan.stages[number].outputs if number < last else ()
        before = plan.stages[number - 1].outputs if number else ()
        gradients = [output for output in before if output.requires_grad]
        if is_partitioned(plan):
            gathered += [output.num_bytes for output in outputs[:1] for _ in range(2)]
            gathered += [output.num_bytes for output in before[:1]]
        for to, crossing in ((number + 1, outputs), (number - 1, gradients)):
            sizes = [size for output in crossing[:1] for size in first_sizes(plan, coordinate, output)]
            sizes += [output.num_bytes for output in crossing[1:]]
            sent.setdefault(to % plan.mesh.pipe, []).extend(sizes)
    for place, sizes in sent.items():
        if sizes:
            yield Reduction("pipe", "boundary", "send", times * len(sizes), times * sum(sizes), to=place)
    if gathered:
        yield Reduction("tensor", "boundary", "all_gather", times * len(gathered), times * sum(gathered))


def is_partitioned(plan: Plan) -> bool:
    """Tell whether the ranks along ``tensor`` each send a part of the first tensor of a boundary.

    DeepSpeed fails with one of the two options alone.
    """
    section = (plan.config or {}).get("pipeline")
    options = section if isinstance(section, Mapping) else {}
    return plan.target == "deepspeed" and plan.mesh.tensor > 1 and bool(options.get("pipe_partitioned", True))


def first_sizes(plan: Plan, coordinate: Coordinate, first: Activation) -> list[int]:
    """Return the bytes of the messages for the first tensor of a boundary: of a partitioned one how it is cut, and a part.

    ``PartitionedTensor`` in runtime/utils.py of DeepSpeed 0.19.8: sizes, ranks and where each part begins, as int64.
    """
    if not is_partitioned(plan):
        return [first.num_bytes]
    num_ranks, size = plan.mesh.tensor, num_bytes(first.dtype)
    part, rest = divmod(first.num_bytes // size, num_ranks)
    return [8 * (len(first.shape) + num_ranks + 4), size * (part + (coordinate.tensor < rest))]
