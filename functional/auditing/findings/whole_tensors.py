"""Tensors that a rank makes or holds whole: SP020, SP021, SP028."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from ....specs.source import Made
from .uneven_splits import is_undivided, is_vocabulary, split_vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.param import ParamSpec
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ...dialects import Dialect

LARGE_BYTES = 16 * 2**20
"""Bytes of a replica from which it is reported: norms and biases of the largest models are smaller."""

LARGE_SHARE = 0.01
"""Share of the bytes that a rank holds from which a replica is reported: a hundred such replicas double them."""

_NUM_FUSED_AXES = 3  # experts, and the two of a matrix
_MAX_NAMED = 4


def made_whole(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find tensors without an init program: one rank makes them whole and sends them."""
    for spec in plan.tree.values() if plan.mesh.num_ranks > 1 else ():
        if isinstance(spec.source, Made):
            cause = (
                f"{spec.type} is made whole ({human_bytes(spec.num_bytes)}) on one rank by {spec.source}, and sent:"
                f" {spec.source.cause}"
            )
            yield Finding(
                "SP020", "warning", spec.path, cause, "Code that is pointwise would run on every rank for its own part"
            )


def large_replicas(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find large tensors that are replicated along ``tensor``, whether or not other mesh axes split them."""
    num = plan.mesh.tensor
    if num == 1:
        return
    held = _held_bytes(plan)
    for spec in plan.tree.values():
        place = spec.places(plan.mesh)[0]
        size = spec.local_bytes(plan.mesh.at(pipe=place))
        is_large = size >= max(LARGE_BYTES, LARGE_SHARE * held[place])
        told_apart = is_undivided(plan, spec) or (plan.mesh.expert > 1 and experts_of(spec) and not spec.on("expert"))
        if spec.on("tensor") or not is_large or told_apart:
            continue
        share = f"{100 * size / held[place]:.0f} % of what the rank holds"
        cause = f"{spec.type} is whole on all {num} ranks along 'tensor': {human_bytes(size)} on each, {share}"
        yield Finding("SP021", "warning", spec.path, cause, _split(spec, num))


def whole_experts(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find modules of experts without a tensor that is split over ``expert``, on a mesh that has this axis."""
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


FINDINGS = {"SP020": made_whole, "SP021": large_replicas, "SP028": whole_experts}


def experts_of(spec: ParamSpec) -> str:
    """Return the module of experts (a fused module or a list) that a parameter belongs to, or ``""``.

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


def _split(spec: ParamSpec, num: int) -> str:
    """Return the verb that would split a tensor, guessed from its shape and name."""
    fits = [axis for axis, size in enumerate(spec.orig_shape) if size % num == 0]
    if spec.kind != "parameter" or not fits:
        return f"If it has to be whole, sch.at[{spec.path!r}].silence('SP021', reason=...)"
    if is_vocabulary(spec):
        return split_vocabulary(spec)
    if len(spec.orig_shape) == 2:  # noqa: PLR2004  a matrix
        return f"If it is a linear module, sch.at[{spec.module!r}].colwise() or .rowwise()"
    return f"sch.at[{spec.path!r}].shard(axis={fits[0]}), with .sync() where its module's output is joined"


def _held_bytes(plan: Plan) -> dict[int, int]:
    """Return the bytes of all tensors on the first rank at each place along ``pipe``."""
    held = dict.fromkeys(range(plan.mesh.pipe), 0)
    for spec in plan.tree.values():
        for place in spec.places(plan.mesh):
            held[place] += spec.local_bytes(plan.mesh.at(pipe=place))
    return held


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
