"""Make the tensors of a rank in a single process, and write them to a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import torch
from attrs import evolve
from torch import Tensor, nn

from ...specs.errors import PlanError, Problem
from ...specs.plan import Plan
from ...specs.program import InitProgram
from ...specs.source import Loaded, Made, Materialised, ModuleValues, OwnValues, Uninitialised, Unknown
from ...specs.steps import Generate
from ..checkpoints.formats.rank_file import RankFile, rank_file_name
from ..interpreter import work
from ..interpreter.torch_effects import TorchEffects
from ..interpreter.work import Piece
from ..model.callables import missing_callables
from ..model.copy import copy_module, on_meta
from ..model.read import differences
from .safetensors import bytes_of, file_layout, sum_of

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.param import ParamSpec


def materialize(plan: Plan, rank: int, folder: str | Path, model: nn.Module | None = None) -> Path:
    """Write all tensors of a rank to ``rank-00017.safetensors``, on the CPU, without a process group; return the file.

    The values equal those that ``execute`` gives the rank on the CPU; on CUDA, init code that no program replaces draws
    other numbers. One tensor is held at a time, or the whole tensors that a call of init code makes together.
    ``execute(from_shards(plan, folder))`` starts from such files.

    Args:
        plan: The plan.
        rank: The rank.
        folder: The folder of rank files; it is made if it does not exist.
        model: The module, for init code and for values that it has; by default the scheduled module.

    Raises:
        PlanError: If there is no such rank, or a tensor has no values or needs a model that is not given.

    >>> import tempfile
    >>> from shardplan.specs import Mesh
    >>> from shardplan.functional import create_schedule, plan_build
    >>> plan = plan_build(create_schedule(nn.Linear(4, 2, device="meta"), Mesh(tensor=2)).at[""].colwise())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     materialize(plan, 1, folder).name
    'rank-00001.safetensors'
    """
    if not isinstance(plan, Plan):
        msg = f"materialize takes a plan, not a {type(plan).__name__}: materialize(plan, rank, folder)"
        raise TypeError(msg)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < plan.mesh.num_ranks:
        cause = f"{rank!r} is no rank: {plan.mesh} has {plan.mesh.num_ranks}"
        raise PlanError([Problem("rank", cause, f"0 to {plan.mesh.num_ranks - 1}")])
    here = plan.mesh.coordinate(rank)
    given = plan.runtime.model if model is None else model
    held = [spec for spec in plan.tree.values() if here.pipe in spec.places(plan.mesh)]
    if problems := list(_wrong(plan, held, given)):
        raise PlanError(problems)
    copied = nn.Module() if given is None else copy_module(given, on_meta, for_planning=False)
    effects = TorchEffects(here, torch.device("cpu"), given or nn.Module(), copied, plan.runtime.callables)
    types = {spec.path: (spec.dtype, spec.local_shape(here)) for spec in held if not _is_bare(spec)}
    own = RankFile(plan.fingerprint, rank, dict.fromkeys(types, 0), dict.fromkeys(_counted(held), 0))
    layout = file_layout(types, own.metadata())
    sums: dict[str, int] = {}
    path = Path(folder) / rank_file_name(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.truncate(layout.num_bytes)
            for name, tensor in _made(plan, held, here, effects):
                file.seek(layout.starts[name])
                file.write(bytes_of(tensor))
                sums[name] = sum_of(tensor)
            loaded = {taken: effects.loading.sums.get(taken, 0) for taken in own.loaded}
            file.seek(0)
            file.write(
                file_layout(types, evolve(own, sums={name: sums[name] for name in types}, loaded=loaded).metadata()).header
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _is_bare(spec: ParamSpec) -> bool:
    return isinstance(spec.source, Uninitialised)


def _counted(held: Iterable[ParamSpec]) -> Iterator[tuple[str, int]]:
    """Iterate over the parts of loaded tensors that have a recorded checksum."""
    for spec in held:
        for number, part in enumerate(spec.source.parts if isinstance(spec.source, Loaded) else ()):
            if part.stored.sum is not None:
                yield spec.path, number


def _wrong(plan: Plan, held: Iterable[ParamSpec], model: nn.Module | None) -> Iterator[Problem]:
    for spec in held:
        match spec.source:
            case Made() | ModuleValues() | OwnValues() if model is None:
                cause = f"its values are {spec.source}, which need the model"
                yield Problem(spec.path, cause, "Give it: materialize(plan, rank, folder, model), or --factory", spec.type)
            case Uninitialised() | Unknown() if spec.num_elements:
                yield Problem(spec.path, "it is planned without values", "Plan with init_weights=True", spec.type)
            case Materialised():
                yield Problem(spec.path, "its values lie in files of single ranks already", "Copy those", spec.type)
            case _:
                pass
    if model is not None:
        yield from differences(plan, model)
    yield from missing_callables(plan.callables, plan.runtime.callables)


def _made(plan: Plan, held: Iterable[ParamSpec], here: Coordinate, effects: TorchEffects) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of a rank, by canonical path; tensors that init code makes come last, in its order."""
    coded: dict[str, ParamSpec] = {}
    for spec in held:
        piece = Piece.part(spec, here)
        match spec.source:
            case InitProgram():
                yield spec.path, effects.evaluate([piece], plan.seed)[0]
            case Loaded():
                assert plan.folder is not None, "a loaded tensor is planned with its folder"
                yield spec.path, effects.load_shard([piece], plan.folder)[0]
            case ModuleValues() | OwnValues():
                yield spec.path, effects.take(piece)
            case Made():
                coded[spec.path] = spec
            case Uninitialised() | Unknown() | Materialised():
                pass
            case _:
                assert_never(spec.source)
    for step in plan.steps:
        if isinstance(step, Generate) and any(plan.tree[path].path in coded for path in step.paths):
            yield from _cut(plan, step, coded, here, effects)


def _cut(
    plan: Plan, step: Generate, coded: Mapping[str, ParamSpec], here: Coordinate, effects: TorchEffects
) -> Iterator[tuple[str, Tensor]]:
    whole = tuple(Piece.whole(plan.tree[path]) for path in step.paths)
    scratch = tuple(Piece.whole(plan.tree[path]) for path in step.scratch)
    made = effects.generate(work.Generate(step.paths, whole, scratch, step.calls, step.key), plan.seed)
    for piece, tensor in zip(whole, made, strict=True):
        if piece.path in coded:
            yield piece.path, effects.slice(tensor, Piece.part(piece.spec, here))
