"""Experts that every rank holds, though the mesh has an axis for them."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.param import ParamSpec
    from ....specs.plan import Plan

_NUM_FUSED_AXES = 3  # experts, and the two of a matrix
_MAX_NAMED = 4


def whole_experts(plan: Plan) -> Iterator[Finding]:
    """Find modules of experts of which no tensor is split over ``expert``, on a mesh that spreads experts."""
    mesh = plan.mesh
    modules: dict[str, list[ParamSpec]] = {}
    for spec in plan.tree.values() if mesh.expert > 1 else ():
        if module := experts_of(spec):
            modules.setdefault(module, []).append(spec)
    for module, specs in modules.items():
        if any(spec.on("expert") for spec in specs):
            continue
        here = mesh.at(pipe=specs[0].places(mesh)[0])
        size = human_bytes(sum(spec.local_bytes(here) for spec in specs))
        is_fused = all(spec.module == module for spec in specs)
        names = {spec.path.removeprefix(f"{module}.").split(".")[0] for spec in specs}
        num = specs[0].orig_shape[0] if is_fused else len(names)
        cause = f"its {num} experts are whole on every rank ({size} on each), and the mesh has expert={mesh.expert}"
        if num % mesh.expert:
            cause += f", which does not divide {num}"
        yield Finding("SP028", "warning", module, cause, _fix(plan, module, num, is_fused=is_fused))


def experts_of(spec: ParamSpec) -> str:
    """Return the module of experts that a parameter belongs to, ``""`` for none: fused ones, or a list of modules.

    >>> from shardplan.specs import ParamSpec
    >>> experts_of(ParamSpec("layers.0.mlp.experts.down_proj", (8, 16, 32), "bfloat16"))
    'layers.0.mlp.experts'
    >>> experts_of(ParamSpec("layers.0.mlp.experts.3.down_proj.weight", (16, 32), "bfloat16"))
    'layers.0.mlp.experts'
    """
    before, found, after = spec.path.rpartition("experts.")
    is_name = bool(found) and (not before or before.endswith("."))
    is_fused = len(spec.orig_shape) >= _NUM_FUSED_AXES
    return f"{before}experts" if is_name and (is_fused or after.split(".")[0].isdigit()) else ""


def _fix(plan: Plan, module: str, num: int, *, is_fused: bool) -> str:
    mesh = plan.mesh
    if not is_fused:
        return "Experts in one tensor each can be spread: sch.at[...].expert_parallel(); a list of modules cannot"
    if num % mesh.expert == 0:
        return f"sch.at[{module!r}].expert_parallel()"
    sizes = [str(n) for n in range(2, mesh.data + 1) if gcd(num, mesh.data) % n == 0]
    if not sizes:
        return f"No size along 'data' ({mesh.data}) divides them: leave out expert={mesh.expert}"
    return f"Mesh(expert=...) may be {', '.join(sizes[:_MAX_NAMED])}; then sch.at[{module!r}].expert_parallel()"
