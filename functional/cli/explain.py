"""``shardplan explain``: everything a plan says about one tensor or one module."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click
from attrs import fields, frozen

from ...specs.dtypes import human_bytes, short_name
from ...specs.errors import PlanError, Problem
from ...specs.finding import Finding
from ...specs.index import Index
from ...specs.layout_steps import LayoutStep
from ...specs.listing import changes, source_words
from ...specs.mesh import STAGE_AXES, MeshAxis
from ...specs.param import ParamSpec
from ...specs.paths import module_of
from ...specs.pattern import closest
from ...specs.program import InitProgram
from ...specs.shard import Shard
from ...specs.source import Loaded, Made
from ...specs.steps import (
    Allocate,
    Broadcast,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    LoadOwn,
    LoadShard,
    Scatter,
    SendCopy,
    Slice,
    Step,
    SumTied,
    TakeShard,
    TakeWhole,
)
from ...specs.text_table import table
from ..audit import audit
from .explain_module import explain_module, module_paths
from .option_types import FILE, load_plan
from .output import echo, echo_json, labelled

if TYPE_CHECKING:
    from ...specs.mesh import Mesh
    from ...specs.plan import Plan

_MOST_ROWS = 16
_FEW = 3
_MOVES = {
    EvaluateShard: "every rank evaluates the program for its own part; nothing is sent",
    EvaluateWhole: "the first rank of stage {stage} evaluates the program for the whole tensor",
    TakeWhole: "the first rank of stage {stage} takes the whole values of its module",
    TakeShard: "every rank takes its part of the values of its own module",
    Allocate: "every rank allocates its part and leaves it without values",
    Slice: "every rank keeps its own part and drops the rest",
}


@click.command(
    "explain",
    epilog="""\b
Examples:
  shardplan explain plan.json model.layers.0.self_attn.q_proj.weight
  shardplan explain plan.json lm_head.weight --json
  shardplan explain plan.json model.layers.0.mlp

\b
Exit codes: 0 explained, 2 there is no such plan, or no such tensor or module in it.
""",
)
@click.argument("plan", type=FILE)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(plan: Path, path: str, *, as_json: bool) -> None:
    """Print why the tensor PATH is where it is: its line in your code, its values, what each rank holds of it.

    Of a module PATH, print the types of all that it computes, call by call.
    """
    loaded = load_plan(plan)
    explanation = explain_module(loaded, path) if path in module_paths(loaded) else explain(loaded, path)
    if as_json:
        echo_json(explanation)
    else:
        echo(str(explanation))


@frozen
class PlacedShard:
    """The shard of a tensor at one place along the mesh axes that split it.

    Args:
        places: The place along each of these mesh axes.
        first_rank: The first rank that holds the shard.
        num_ranks: Number of ranks that hold it.
        index: The shard's intervals along each axis.
        num_bytes: Bytes on each of these ranks, padding included.
    """

    places: tuple[tuple[MeshAxis, int], ...]
    first_rank: int
    num_ranks: int
    index: Index
    num_bytes: int


@frozen
class Explanation:
    """Everything a plan says about one tensor.

    Args:
        spec: The tensor's spec, with the line of code that split it.
        type: Its type in printed form.
        stages: The stages that hold it, the owner's first; and the number of stages.
        splits: The split of each axis, in words.
        values: The source of its values, in words.
        moves: The steps by which ranks get the tensor, in words and in order.
        modules: The changes to modules that hold the tensor, a line each.
        held: The shard at each place.
        findings: The audit's findings on the tensor, or on a module that holds it.
    """

    spec: ParamSpec
    type: str
    stages: tuple[tuple[int, ...], int]
    splits: tuple[str, ...]
    values: str
    moves: tuple[str, ...]
    modules: tuple[str, ...]
    held: tuple[PlacedShard, ...]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        spec = self.spec
        stages, num_stages = self.stages
        kind = "trained parameter" if spec.kind == "parameter" and spec.requires_grad else spec.kind.replace("_", " ")
        copies = f", copies on {', '.join(map(str, stages[1:]))}" if stages[1:] else ""
        lines = [
            f"{spec.path}  {self.type}",
            "",
            *labelled("is", [f"{'frozen ' * (kind == 'parameter')}{kind}, stage {stages[0]} of {num_stages}{copies}"]),
            *labelled("split", self.splits or ["no: every rank of its stage holds it whole"]),
            *labelled("said by", [str(spec.origin)] if spec.origin else []),
            *labelled("values", [self.values]),
            *labelled("made", self.moves),
            *labelled("module", self.modules),
            *labelled("tied", [f"= {', '.join(spec.tie)}"] if spec.tie else []),
            *labelled("tags", [f"{name}: {value}" for name, value in spec.tags.items()]),
            *labelled("holds", self._rows()),
            *labelled("audit", [line for finding in self.findings for line in str(finding).splitlines()]),
        ]
        return "\n".join(lines)

    def _rows(self) -> Iterator[str]:
        names = [mesh_axis for mesh_axis, _ in self.held[0].places]
        axes = [f"axis {axis}" for axis in range(len(self.spec.orig_shape))]
        rows = [
            (
                *(str(place) for _, place in held.places),
                str(held.first_rank),
                str(held.num_ranks),
                *(" ".join(f"{start}:{stop}" for start, stop in intervals) or "nothing" for intervals in held.index),
                human_bytes(held.num_bytes),
            )
            for held in self.held[:_MOST_ROWS]
        ]
        yield from table([(*names, "first rank", "ranks", *axes, "bytes"), *rows], right=True)
        if len(self.held) > _MOST_ROWS:
            yield f"and {len(self.held) - _MOST_ROWS} places more; --json has all"


def explain(plan: Plan, path: str) -> Explanation:
    """Collect everything a plan says about a tensor.

    Args:
        plan: The plan.
        path: Any path of the tensor.

    Raises:
        PlanError: If no tensor has the path; the error names the closest paths.

    >>> from shardplan.specs import Mesh, Plan, SpecTree
    >>> tree = SpecTree([ParamSpec("up.weight", (8, 4), "float32", shards=(Shard(0),))])
    >>> explain(Plan(Mesh(tensor=2), tree, steps=()), "up.weight").held[1].index
    (((4, 8),), ((0, 4),))
    """
    if path not in plan.tree:
        near = closest(path, [*plan.tree.all_paths, *module_paths(plan)])
        fix = (
            f"The closest are {', '.join(near)}"
            if near
            else "shardplan show lists them, repeated layers folded: layers.{0..3} are layers.0 to layers.3"
        )
        raise PlanError([Problem(path, "no tensor and no module of the plan has this path", fix)])
    spec = plan.tree[path]
    modules = set(map(module_of, spec.paths))
    changed = [step for step in plan.steps if isinstance(step, LayoutStep) and step.module in modules]
    about = {*spec.paths, *modules}
    return Explanation(
        spec=spec,
        type=spec.type,
        stages=((spec.stage, *spec.also_on), max(len(plan.stages), plan.mesh.pipe)),
        splits=tuple(_split(shard, plan.mesh) for shard in spec.shards),
        values=_values(spec),
        moves=tuple(dict.fromkeys(words for step in plan.steps if (words := _move(step, spec)))),
        modules=tuple(changes(changed)[1:]),
        held=tuple(_held(plan.mesh, spec)),
        findings=tuple(finding for finding in audit(plan).findings if finding.path in about),
    )


def _split(shard: Shard, mesh: Mesh) -> str:
    num = mesh.num(shard.mesh_axis)
    own = [field for field in fields(Shard) if field.name not in {"axis", "mesh_axis"}]
    told = [f"{field.name}={value}" for field in own if (value := getattr(shard, field.name)) != field.default]
    ranks = f"over {shard.mesh_axis}, {num} ranks" if num > 1 else f"over {shard.mesh_axis}, which has one rank: whole"
    return ", ".join([f"axis {shard.axis} {ranks}", *told])


def _values(spec: ParamSpec) -> str:
    match spec.source:
        case InitProgram(replaces=True):
            return f"{spec.source}: what .init says in the schedule"
        case InitProgram():
            return f"{spec.source}: what the model's own init code does, followed while planning"
        case Made(cause=cause):
            return f"{spec.source}: code that runs on the whole tensor" + (f", as {cause}" if cause else "")
        case Loaded(parts=parts):
            found = [f"{part.stored.key} of {part.stored.file}" for part in parts]
            told = [*found[:_FEW], f"and {len(found) - _FEW} more"] if len(found) > _FEW else found
            return f"{source_words(spec)}: {', '.join(told)}"
        case _:
            return str(spec.source)


def _move(step: Step, spec: ParamSpec) -> str:  # noqa: PLR0911  a case a step
    """Describe the effect of a step on a tensor; "" if the step does not touch it."""
    match step:
        case SumTied(path=path, between=between) if path == spec.path:
            return f"stages at {', '.join(map(str, between))} along pipe sum its gradient"
        case Generate(paths=paths) if not {*paths}.isdisjoint(spec.paths):
            return f"the first rank of stage {step.stage} runs the code on the whole tensor"
        case SendCopy(stage=stage, to=to, paths=paths) if spec.path in paths:
            return f"stage {stage} sends what it holds to stage {to}"
        case Scatter(over=over, paths=paths) if spec.path in paths:
            return f"every rank is sent its own part, over {' x '.join(over)}"
        case Broadcast(over=over, paths=paths) if spec.path in paths:
            return f"it is sent to all, over {' x '.join(over)}"
        case LoadShard(over=over, paths=paths) if spec.path in paths:
            who = f"the first ranks along {' x '.join(over)} read their" if over else "every rank reads its"
            dtypes = (short_name(step.stored_dtype), short_name(spec.dtype))
            converted = f" as {dtypes[0]}, and keeps it as {dtypes[1]}" if dtypes[0] != dtypes[1] else ""
            return f"stage {step.stage}: {who} own part of the files{converted}"
        case LoadOwn(paths=paths) if spec.path in paths:
            return f"stage {step.stage}: every rank reads it from the file of its own"
        case EvaluateShard() | EvaluateWhole() | TakeWhole() | TakeShard() | Allocate() | Slice() if spec.path in step.paths:
            return _MOVES[type(step)].format(stage=step.stage)
        case _:
            return ""


def _held(mesh: Mesh, spec: ParamSpec) -> Iterator[PlacedShard]:
    """Iterate over the places along the mesh axes that split a tensor, in the order of ranks."""
    places = spec.places(mesh)
    first = mesh.coordinate(mesh.stage(places[0])[0])
    names = spec.mesh_axes(first)
    num_ranks = len(places) * mesh.num(*STAGE_AXES) // mesh.num(*names)
    for indices in product(*(range(mesh.num(name)) for name in names)):
        at = dict(zip(names, indices, strict=True))
        here = mesh.at(pipe=first.pipe, **at)
        yield PlacedShard(tuple(at.items()), here.rank, num_ranks, spec.index(here), spec.local_bytes(here))
