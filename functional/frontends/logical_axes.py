"""A schedule from rules that name the axes of tensors, and split the names over mesh axes.

They are logical axis rules as in t5x and MaxText: a pattern for paths, and a name for each axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import evolve
from torch import nn

from ...specs.errors import Problem
from ...specs.mesh import SPLIT_AXES
from ...specs.paths import module_of, name_of
from ...specs.pattern import closest, compile_pattern
from ..model.linear import linear_of
from ..schedule import create_schedule

if TYPE_CHECKING:
    from ...specs.mesh import Mesh, MeshAxis
    from ...specs.param import ParamSpec
    from ..schedule import Schedule

Rule = tuple[str, Sequence[str | None]]
"""A pattern that selects tensors, and a name for each of their axes; None for an axis without a name."""

MESH_AXIS_OF: Mapping[str, MeshAxis] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "joined_kv": "tensor",
    "experts": "expert",
    **{mesh_axis: mesh_axis for mesh_axis in SPLIT_AXES},
}
"""Mesh axes by axis names of t5x and MaxText, and by their own names; other names stay whole."""


def schedule_from_rules(
    model: nn.Module,
    mesh: Mesh,
    rules: Sequence[Rule],
    *,
    mesh_axes: Mapping[str, MeshAxis] = MESH_AXIS_OF,
    allow_unmatched: bool = False,
) -> Schedule:
    """Return the schedule that splits each tensor as the first rule says whose pattern matches it.

    The weights of linear modules are split by ``.colwise()`` and ``.rowwise()``, embeddings by ``.vocab_parallel()``, all of
    which declare their communication too (a linear module with ``vocab`` outputs joins them); other tensors by
    ``.shard()``. Attributes that hold global sizes are set by further verbs. Buffers that no rule matches stay whole.

    Args:
        model: The model.
        mesh: The ranks.
        rules: Pairs of a pattern, as in ``sch.at[pattern]``, and the names of the axes of the tensors that it selects.
        mesh_axes: Mesh axis over which axes of a name are split; axes of other names stay whole.
        allow_unmatched: Leave tensors that no rule matches whole, tagged ``unmatched``; else such parameters are problems.

    >>> import torch
    >>> from torch import nn
    >>> from shardplan.specs import Mesh
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> rules = [("0.weight", ("mlp", "embed")), ("0.bias", ("mlp",)), ("2.weight", ("embed", "mlp")), ("2.bias", (None,))]
    >>> for spec in schedule_from_rules(model, Mesh(tensor=2), rules).tree.values():
    ...     print(spec)
    0.weight  f32[32@tensor, 8]
    0.bias  f32[32@tensor]
    2.weight  f32[8, 32@tensor]
    2.bias  f32[8]
    """
    sch = create_schedule(model, mesh)
    if wrong := list(_wrong_rules(rules, mesh_axes)):
        return evolve(sch, problems=(*sch.problems, *wrong))
    problems: list[Problem] = []
    named: dict[str, Sequence[str | None]] = {}
    used: set[str] = set()
    for spec in sch.tree.values():
        matching = next(((pattern, names) for pattern, names in rules if _matches(pattern, spec)), None)
        if matching is not None:
            pattern, names = matching
            used.add(pattern)
            if len(names) == len(spec.orig_shape):
                named[spec.path] = names
            else:
                cause = f"the rule {pattern!r} names {len(names)} axes, {tuple(names)}, and it has {len(spec.orig_shape)}"
                problems.append(Problem(spec.path, cause, "Name each axis; None for one that stays whole", spec.type))
        elif allow_unmatched:
            sch = sch.at[spec.path].tag(unmatched=True)
        elif spec.kind == "parameter":
            near = closest(spec.path, [pattern for pattern, _ in rules])
            closest_one = f"; the closest is {near[0]!r}" if near else ""
            problems.append(
                Problem(spec.path, "no rule matches it", f"Add one{closest_one}; or allow_unmatched=True", spec.type)
            )
    for path, names in named.items():
        for axis, name in enumerate(names):
            if name is not None and name in mesh_axes and mesh.num(mesh_axes[name]) > 1:
                sch = _split(sch, path, axis, mesh_axes[name], gather=name == "vocab")
    problems += _contradicted(sch, named, mesh_axes)
    paths = list(sch.tree.all_paths)
    problems += (_unused(pattern, sch, paths) for pattern, _ in rules if pattern not in used)
    return evolve(sch, problems=(*sch.problems, *problems))


def _split(sch: Schedule, path: str, axis: int, mesh_axis: MeshAxis, *, gather: bool) -> Schedule:
    """Split an axis of a tensor, by the verb of its module if it has any."""
    owner, name = module_of(path), name_of(path)
    module = sch.runtime.model.get_submodule(owner)
    kind = linear_of(module)
    if mesh_axis == "tensor" and name == "weight" and kind is not None:
        if axis == kind.out_axis:
            return sch.at[owner].colwise(gather_output=gather)
        return sch.at[owner].rowwise()
    if mesh_axis == "tensor" and name == "weight" and isinstance(module, nn.Embedding) and axis == 0:
        return sch.at[owner].vocab_parallel()
    return sch.at[path].shard(axis=axis, mesh_axis=mesh_axis)


def _contradicted(
    sch: Schedule, named: Mapping[str, Sequence[str | None]], mesh_axes: Mapping[str, MeshAxis]
) -> Iterator[Problem]:
    """Iterate over tensors that a module's verb has split along another axis than their own rule says: biases."""
    for path, names in named.items():
        spec = sch.tree[path]
        said = {axis for axis, name in enumerate(names) if name in mesh_axes}
        for shard in spec.shards:
            if shard.axis not in said:
                cause = (
                    f"its rule leaves axis {shard.axis} whole, and its module's weight is split so that it has to be split"
                )
                yield Problem(path, cause, "Name the axis as the weight's rule does", spec.type)


def _matches(pattern: str, spec: ParamSpec) -> bool:
    return any(map(compile_pattern(pattern).fullmatch, spec.paths))


def _unused(pattern: str, sch: Schedule, paths: Sequence[str]) -> Problem:
    if any(_matches(pattern, spec) for spec in sch.tree.values()):
        return Problem(pattern, "all tensors that it matches are matched by rules before it", "Move it up, or drop it")
    near = closest(pattern, paths)
    return Problem(pattern, "the rule matches no tensor", f"The closest are {', '.join(near)}" if near else "Drop it")


def _wrong_rules(rules: object, mesh_axes: object) -> Iterator[Problem]:
    """Iterate over problems with the rules themselves."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        yield Problem(
            "rules", f"they are a list of (pattern, axis names), not {rules!r}", '[("**.q_proj.weight", ("heads", None))]'
        )
        return
    for number, rule in enumerate(rules):
        pair = isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)  # noqa: PLR2004  pattern and names
        if not pair or isinstance(rule[1], str) or not isinstance(rule[1], (tuple, list)):
            yield Problem(
                f"rules[{number}]", f"it is no pair of a pattern and axis names: {rule!r}", '("**.weight", ("mlp", None))'
            )
            continue
        try:
            compile_pattern(rule[0])
        except ValueError as error:
            yield Problem(f"rules[{number}]", f"{rule[0]!r}: {error}", "Close it")
        for name in rule[1]:
            if name is not None and not isinstance(name, str):
                yield Problem(f"rules[{number}]", f"the name of an axis is a string or None, not {name!r}", "None")
    for name, mesh_axis in dict(mesh_axes).items() if isinstance(mesh_axes, Mapping) else ():
        if mesh_axis not in SPLIT_AXES:
            yield Problem(f"mesh_axes[{name!r}]", f"mesh axis {mesh_axis!r} is unknown", "There are data, expert, tensor")
    if not isinstance(mesh_axes, Mapping):
        yield Problem("mesh_axes", f"they are mesh axes by axis name, not {mesh_axes!r}", "{'mlp': 'tensor'}")
