"""The steps that make process groups, as the other steps of a plan need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...specs.layout_steps import LayoutStep
from ...specs.mesh import MeshAxis, in_mesh_order
from ...specs.steps import Broadcast, MakeGroups, MakeTieGroups, Scatter, SendCopy, Step, SumTied

MeshAxes = tuple[MeshAxis, ...]


def group_steps(steps: Sequence[Step], of_dialect: Sequence[MeshAxes]) -> Iterator[Step]:
    """Iterate over the steps that make the groups in which ranks communicate.

    Args:
        steps: All other steps of the plan.
        of_dialect: Mesh axes along which the target needs groups of its own.

    >>> from shardplan.specs.layout_steps import Sync
    >>> print(*group_steps([Sync("up", "forward_post", "all_reduce"), SumTied("head.weight", (0, 3))], [("data",)]))
    MakeGroups(over=(('data',), ('tensor',)), sharing=()) MakeTieGroups(between=((0, 3),))
    """
    over: set[MeshAxes] = set(of_dialect)
    sharing: dict[tuple[MeshAxis, int], None] = {}
    between: set[tuple[int, ...]] = set()
    for step in steps:
        match step:
            case Scatter(over=mesh_axes) | Broadcast(over=mesh_axes):
                over.add(mesh_axes)
            case _ if isinstance(step, LayoutStep):
                over.update(step.groups())
                sharing |= dict.fromkeys(step.neighbours())
            case SendCopy(stage=stage, to=to):
                between.add((stage, to))
            case SumTied(between=stages):
                between.add(stages)
            case _:
                pass
    if over or sharing:
        yield MakeGroups(tuple(sorted(over, key=in_mesh_order)), tuple(sharing))
    if between:
        yield MakeTieGroups(tuple(sorted(between)))
