"""The plan: everything that every rank will do, as data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, assert_never, get_args

from attrs import field, frozen
from frozendict import deepfreeze, frozendict

from .canonical import canonical_fields, canonical_json
from .equality import Equality, Trust, layout_digest
from .errors import PlanError, Problem
from .finding import Silence
from .json_values import NEVER_WRITTEN, WRITTEN_IF_SET, check_plain
from .layout_steps import LayoutStep, Sync, SyncOp
from .listing import listing, types
from .mesh import SPLIT_AXES, Mesh
from .microbatch import Microbatch
from .pipeline import Pipeline, Stage
from .program import RANDOM_SCHEME
from .source import Loaded, ModuleCall, TensorCall
from .steps import (
    Agree,
    Allocate,
    AsDTensors,
    Broadcast,
    CheckLoaded,
    EvaluateShard,
    EvaluateWhole,
    Generate,
    LoadOwn,
    LoadShard,
    MakeGroups,
    MakeOptimizer,
    MakeTieGroups,
    Place,
    Scatter,
    SendCopy,
    Slice,
    Step,
    SumTied,
    TakeShard,
    TakeStages,
    TakeWhole,
    Tie,
    Wrap,
)
from .stored import Folder
from .tree import SpecTree

SCHEMA_VERSION = 6
"""Version of the JSON form; a plan of another version is refused."""


@frozen(eq=False, repr=False)
class Runtime:
    """Objects that execution needs and that cannot be saved: the model, the graphs of its stages, callables by name."""

    model: Any = None
    partition: Any = None
    callables: frozendict[str, Any] = field(factory=frozendict, converter=frozendict)


@frozen(repr=False)
class Plan:
    """A plan for all ranks, as data: print it, compare it, save it, audit it, execute it.

    Args:
        mesh: The device mesh.
        tree: Every tensor of the model, with its layout and source.
        steps: Instructions, in a single list for all ranks.
        target: Name of the runtime that takes the module; None for none.
        config: The target's configuration.
        seed: Seed of all random numbers.
        random_scheme: Version of the function from seed, path and element to random values.
        schema_version: Version of the JSON form.
        pipeline: How the model is cut along ``pipe``; None if it is not.
        microbatch: Messages and saved activations of a micro-batch; None if none was followed.
        folder: The files that values are read from; None if none are.
        silences: Findings that are known and meant.
        runtime: Model and callables; outside equality, hash, repr and JSON.
        trusts: Modules that nobody can follow, and the user's word for them.
        equality: The evidence that it computes what the whole model computes; None if no example inputs were followed.
            It is saved, and stands outside equality, hash and fingerprint.

    Raises:
        PlanError: If tensors do not fit the mesh, or steps name tensors that are not there.
    """

    mesh: Mesh
    tree: SpecTree
    steps: tuple[Step, ...] = field(converter=tuple)
    target: str | None = None
    config: frozendict[str, Any] | None = field(default=None, converter=deepfreeze, validator=check_plain)
    seed: int = 0
    random_scheme: int = RANDOM_SCHEME
    schema_version: int = SCHEMA_VERSION
    pipeline: Pipeline | None = None
    microbatch: Microbatch | None = None
    folder: Folder | None = None
    silences: tuple[Silence, ...] = field(default=(), converter=tuple)
    runtime: Runtime = field(factory=Runtime, eq=False, metadata=NEVER_WRITTEN)
    trusts: tuple[Trust, ...] = field(default=(), converter=tuple, metadata=WRITTEN_IF_SET)
    equality: Equality | None = field(default=None, eq=False, metadata=WRITTEN_IF_SET)

    def __attrs_post_init__(self) -> None:
        problems = [
            *misfits(self.mesh, self.tree, len(self.stages)),
            *_strangers(self.mesh, self.tree, self.steps),
            *_unread(self.tree, self.folder),
        ]
        if problems:
            raise PlanError(problems)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The pipeline's stages; none if the model is not cut."""
        return self.pipeline.stages if self.pipeline else ()

    @property
    def ties(self) -> tuple[Tie, ...]:
        """The tensors that stand under several paths."""
        return tuple(step for step in self.steps if isinstance(step, Tie))

    @property
    def callables(self) -> tuple[str, ...]:
        """Names of the user's functions that the plan calls, each once."""
        names: dict[str, None] = {}
        for step in self.steps:
            match step:
                case Generate(calls=calls):
                    for call in calls:
                        match call:
                            case ModuleCall(kind="init_weights", code=name) | TensorCall(function=name):
                                names[name] = None
                            case ModuleCall():
                                pass
                case Sync(op=op) if op not in get_args(SyncOp):
                    names[op] = None
                case _:
                    pass
        return tuple(names)

    @cached_property
    def layout_digest(self) -> str:
        """Digest of what decides how the split model computes; evidence of another layout is none."""
        return layout_digest(self.mesh, self.tree, self.steps)

    @property
    def is_followed(self) -> bool:
        """Whether there is evidence of how the split model computes, as it is laid out now."""
        return self.equality is not None and self.equality.layout == self.layout_digest

    @cached_property
    def canonical_fields(self) -> Mapping[str, str]:
        """The canonical JSON of each field, by name, from which the fingerprint is computed."""
        return canonical_fields(self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON, in hexadecimal digits: equal plans, equal fingerprints, in every process."""
        return hashlib.sha256(canonical_json(self.canonical_fields).encode()).hexdigest()

    def __str__(self) -> str:
        head = f"plan {self.fingerprint[:12]}  target={self.target or 'none'} seed={self.seed}"
        told = listing(self.mesh, self.tree, self.steps, self.pipeline, self.silences, self.trusts)
        return "\n".join([head, str(self.mesh), *told, *types(self.equality)])

    def __repr__(self) -> str:
        return f"Plan({self.mesh}, {len(self.tree)} tensors, {len(self.steps)} steps, {self.fingerprint[:12]})"


def misfits(mesh: Mesh, tree: SpecTree, num_stages: int = 0) -> list[Problem]:
    """Return the tensors that do not fit a mesh: stages that are not there, splits that do not divide.

    Args:
        mesh: The ranks.
        tree: The tensors.
        num_stages: Stages of the pipeline; 0 for as many as the mesh has places along ``pipe``.
    """
    problems: list[Problem] = []
    for spec in tree.values():
        missing = [stage for stage in (spec.stage, *spec.also_on) if stage >= (num_stages or mesh.pipe)]
        there = f"is none of the {num_stages} stages" if num_stages else f"is not on {mesh}"
        problems += [Problem(spec.path, f"stage {stage} {there}", type=spec.type) for stage in missing]
        for shard in spec.shards:
            if misfit := shard.misfit(spec.orig_shape[shard.axis], mesh.num(shard.mesh_axis)):
                problems.append(Problem(spec.path, misfit.cause, misfit.fix, spec.type))
            if shard.mesh_axis not in SPLIT_AXES:
                cause = f"a tensor is not split over {shard.mesh_axis!r}"
                problems.append(Problem(spec.path, cause, "Split over 'tensor'", spec.type))
    return problems


def _strangers(mesh: Mesh, tree: SpecTree, steps: tuple[Step, ...]) -> list[Problem]:
    """Return problems of steps that name missing stages or tensors."""
    problems: list[Problem] = []
    for step in steps:
        named, places = _named(step)
        name = type(step).__name__
        problems += [Problem(path, f"a {name} step names it, but no tensor has it") for path in named if path not in tree]
        problems += [
            Problem("", f"a {name} step is for stage {place}, which is not on {mesh}")
            for place in places
            if not 0 <= place < mesh.pipe
        ]
    return problems


def _unread(tree: SpecTree, folder: Folder | None) -> list[Problem]:
    """Return the tensors that are read from files which the plan's folder does not name."""
    known = {file.name for file in folder.files} if folder else set[str]()
    loaded = [(spec, part.stored) for spec in tree.values() if isinstance(spec.source, Loaded) for part in spec.source.parts]
    cause = "it is read from {!r}, which is no file of the plan's folder"
    return [Problem(s.path, cause.format(p.file), "Plan again", s.type) for s, p in loaded if p.file not in known]


def _named(step: Step) -> tuple[tuple[str, ...], tuple[int, ...]]:  # noqa: PLR0911  one case a step
    """Return the tensors that a step names, and the places along ``pipe``."""
    if isinstance(step, LayoutStep):
        return (), ()
    match step:
        case Agree() | MakeGroups() | CheckLoaded() | AsDTensors() | MakeOptimizer() | TakeStages() | Wrap():
            return (), ()
        case MakeTieGroups(between=between):
            return (), tuple(place for places in between for place in places)
        case SumTied(path=path, between=places):
            return (path,), places
        case SendCopy(stage=stage, to=to, paths=paths):
            return paths, (stage, to)
        case Generate(stage=stage, paths=paths, scratch=scratch):
            return (*paths, *scratch), (stage,)
        case Tie(stage=stage, path=path, aliases=aliases):
            return (path, *aliases), (stage,)
        case (
            EvaluateWhole(stage=stage, paths=paths)
            | EvaluateShard(stage=stage, paths=paths)
            | TakeWhole(stage=stage, paths=paths)
            | TakeShard(stage=stage, paths=paths)
            | LoadShard(stage=stage, paths=paths)
            | LoadOwn(stage=stage, paths=paths)
            | Allocate(stage=stage, paths=paths)
            | Scatter(stage=stage, paths=paths)
            | Broadcast(stage=stage, paths=paths)
            | Slice(stage=stage, paths=paths)
            | Place(stage=stage, paths=paths)
        ):
            return paths, (stage,)
        case _:
            assert_never(step)
