"""The steps that make process groups, as the other steps of a plan need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...specs.layout_steps import LayoutStep, needed_neighbours
from ...specs.mesh import MeshAxis, in_mesh_order
from ...specs.steps import Broadcast, MakeGroups, MakeTieGroups, Scatter, SendCopy, Step, SumTied

MeshAxes = tuple[MeshAxis, ...]


def group_steps(
    values: Sequence[Step], layout: Sequence[LayoutStep], tied: Sequence[SumTied], of_dialect: Sequence[MeshAxes]
) -> Iterator[Step]:
    """Iterate over the steps that make the groups in which ranks communicate.

    Args:
        values: The steps that give tensors their values.
        layout: The steps that change how modules compute.
        tied: The sums of gradients over stages.
        of_dialect: Mesh axes along which the target needs groups of its own.

    >>> from shardplan.specs.layout_steps import Sync
    >>> print(*group_steps([], [Sync("up", "forward_post", "all_reduce")], [SumTied("head.weight", (0, 3))], [("data",)]))
    MakeGroups(over=(('data',), ('tensor',)), sharing=()) MakeTieGroups(between=((0, 3),))
    """
    over = {*of_dialect, *(mesh_axes for step in layout for mesh_axes in step.groups())}
    over |= {step.over for step in values if isinstance(step, (Scatter, Broadcast))}
    sharing = needed_neighbours(layout)
    if over or sharing:
        yield MakeGroups(tuple(sorted(over, key=in_mesh_order)), sharing)
    between = {(step.stage, step.to) for step in values if isinstance(step, SendCopy)} | {step.between for step in tied}
    if between:
        yield MakeTieGroups(tuple(sorted(between)))
