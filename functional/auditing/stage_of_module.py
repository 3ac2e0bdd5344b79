"""Which stage a module belongs to. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...specs.plan import Plan


def stages_of(plan: Plan, modules: Iterable[str]) -> dict[str, int]:
    """Return the stage of each module: that which runs it, or a module around it, else that of its first tensor, else 0.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> specs = [ParamSpec(f"layers.{i}.weight", (4, 4), "float32", stage=i) for i in (0, 1)]
    >>> stages_of(Plan(Mesh(pipe=2), SpecTree(specs), ()), ["layers.1", "layers"])
    {'layers.1': 1, 'layers': 0}
    """
    running = {module: number for number, stage in enumerate(plan.stages) for module in stage.modules}
    holding: dict[str, int] = {}
    for spec in plan.tree.values():
        for path in spec.paths:
            names = path.split(".")
            for depth in range(len(names)):
                holding.setdefault(".".join(names[:depth]), spec.stage)
    return {module: _stage(module, running, holding) for module in dict.fromkeys(modules)}


def _stage(module: str, running: dict[str, int], holding: dict[str, int]) -> int:
    names = module.split(".")
    for depth in range(len(names), 0, -1):
        if (number := running.get(".".join(names[:depth]))) is not None:
            return number
    return holding.get(module, 0)
