"""Modules by their paths: the repeated layer and the modules around, and the stage that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ...specs.plan import Plan


def block_of(module: str) -> str:
    """Return the repeated layer that a module is in, ``""`` if it is in none.

    >>> block_of("model.layers.3.mlp.up"), block_of("model.norm")
    ('model.layers.3', '')
    """
    names = module.split(".")
    numbered = [at for at, name in enumerate(names) if name.isdigit() and at < len(names) - 1]
    return ".".join(names[: numbered[-1] + 1]) if numbered else ""


def modules_around(path: str) -> Iterator[str]:
    """Iterate over the modules around a tensor or module, outermost (``""``, the model itself) first.

    >>> list(modules_around("layers.3.weight"))
    ['', 'layers', 'layers.3']
    """
    names = path.split(".")
    return (".".join(names[:depth]) for depth in range(len(names)))


def spans_of(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return for each module the positions of its first and last tensor among all paths.

    >>> spans_of(["a.weight", "b.weight", "b.bias"])["b"]
    (1, 2)
    """
    spans: dict[str, tuple[int, int]] = {}
    for place, path in enumerate(paths):
        for module in modules_around(path):
            spans[module] = (spans.get(module, (place, place))[0], place)
    return spans


def stages_of(plan: Plan, modules: Iterable[str]) -> dict[str, int]:
    """Return the stage of each module: the stage that runs it or a module around it, else that of its first tensor, else 0.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> specs = [ParamSpec(f"layers.{i}.weight", (4, 4), "float32", stage=i) for i in (0, 1)]
    >>> stages_of(Plan(Mesh(pipe=2), SpecTree(specs), ()), ["layers.1", "layers"])
    {'layers.1': 1, 'layers': 0}
    """
    running = {module: number for number, stage in enumerate(plan.stages) for module in stage.modules}
    holding: dict[str, int] = {}
    for spec in plan.tree.values():
        for path in spec.paths:
            for module in modules_around(path):
                holding.setdefault(module, spec.stage)

    def stage_of(module: str) -> int:
        around = [name for name in (*modules_around(module), module) if name]
        return next((running[name] for name in reversed(around) if name in running), holding.get(module, 0))

    return {module: stage_of(module) for module in dict.fromkeys(modules)}
