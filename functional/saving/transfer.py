"""Transfer a model and its optimizer's states to the ranks of another mesh, over the process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import evolve
from torch import Tensor

from ...specs.dtypes import num_bytes
from ...specs.errors import PlanError, Problem
from ...specs.index import whole_index
from ...specs.ownership import holders, local_boxes
from ...specs.resharding import Transfer
from ..checkpoints.optimizer_states import settings_for
from ..dialects import dialect_of
from .held_tensors import held_tensors
from .messages import agreement, as_message, messages, receive, view_box
from .optimizer_states import LocalStates, TensorState, all_groups, all_states, give_states, groups_of, local_states

if TYPE_CHECKING:
    from ...specs.param import ParamSpec
    from ...specs.plan import Plan
    from ...specs.resharding import Reshard


_BY_FILES = "Go by files: save_checkpoint, then init_weights=Checkpoint(folder) and load_optimizer"


def transfer(
    resharding: Reshard,
    source_model: Any,
    target_model: Any,
    *,
    source_optimizer: Any = None,
    target_optimizer: Any = None,
) -> None:
    """Transfer the tensors of one mesh's ranks to another mesh's ranks; every rank calls it.

    Both meshes consist of the same processes; if their number changes, go by files: ``save_checkpoint``, then
    ``init_weights=Checkpoint(folder)`` and ``load_optimizer``. Messages have at most 32 MiB; a rank copies the parts that it
    holds already.

    Args:
        resharding: The transfers: ``reshard(plan_a, plan_b)``.
        source_model: The model that ``execute(plan_a)`` returned.
        target_model: The model that ``execute(plan_b)`` returned; its values are overwritten.
        source_optimizer: The source's torch optimizer; with it, states and settings are transferred too.
        target_optimizer: The target's torch optimizer.

    Raises:
        PlanError: In a single process, if a model differs from its plan.
        ExecutionError: On every rank, with the first error of any rank.
    """
    before: Mapping[str, Tensor] = {}
    after: Mapping[str, Tensor] = {}
    states = LocalStates({}, ())
    with agreement(resharding.target):
        _check(resharding, source_optimizer, target_optimizer)
        before, after = _held(resharding.source, source_model), _held(resharding.target, target_model)
        if source_optimizer is not None:
            states = local_states(resharding.source, before, source_optimizer)
    with torch.no_grad():
        for spec in resharding.target.tree.values():
            _move(resharding, resharding.source.tree[spec.path], spec, before.get(spec.path), after.get(spec.path))
    if target_optimizer is None:
        return
    known, saved = all_states(resharding.source, states), all_groups(states)
    settings: tuple[Mapping[str, Any], ...] = ()
    with agreement(resharding.target):
        settings, problems = settings_for(saved, groups_of(resharding.target, after, target_optimizer))
        cause, fix = "the optimizer has noted it on other ranks, and not on this one", "Send it when all ranks have trained"
        lacking = [s.key for s in known if s.spec.path in before and s.key not in states.tensors]
        if problems := [*problems, *(Problem(key, cause, fix) for key in lacking)]:
            raise PlanError(problems)
    with torch.no_grad():
        received = _received(resharding, known, states, after)
    give_states(resharding.target, after, target_optimizer, received, settings)


def _check(resharding: Reshard, source_optimizer: object, target_optimizer: object) -> None:
    before, after = resharding.source.mesh, resharding.target.mesh
    found = dist.get_world_size() if dist.is_initialized() else 1
    problems: list[Problem] = []
    if {before.num_ranks, after.num_ranks} != {found}:
        cause = f"{before} has {before.num_ranks} ranks, {after} has {after.num_ranks}, and the process group {found}"
        problems.append(Problem("", cause, _BY_FILES))
    if (source_optimizer is None) != (target_optimizer is None):
        cause = "one of the two optimizers is given"
        problems.append(Problem("optimizer", cause, "transfer(..., source_optimizer=..., target_optimizer=...)"))
    if cause := dialect_of(resharding.target.target).training(resharding.target).own_copies:
        problems.append(Problem("target", cause, _BY_FILES))
    if problems:
        raise PlanError(problems)


def _held(plan: Plan, model: Any) -> Mapping[str, Tensor]:
    """Return the tensors that this rank holds of a plan."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    held = held_tensors(plan, model, plan.mesh.coordinate(rank))
    holding = dialect_of(plan.target).holding()
    if problems := [Problem(path, cause, _BY_FILES) for path, t in held.items() if (cause := holding.in_pieces(t))]:
        raise PlanError(problems)
    return held


def _move(resharding: Reshard, before: ParamSpec, after: ParamSpec, mine: Tensor | None, into: Tensor | None) -> None:
    """Transfer one tensor; all ranks go through its parts in the same order, so that no rank waits in vain."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for move in _transfers(resharding, before, after):
        if rank not in (move.source, move.target):
            continue
        sender, receiver = resharding.source.mesh.coordinate(move.source), resharding.target.mesh.coordinate(move.target)
        there, here = local_boxes(after, receiver, move.index), local_boxes(before, sender, move.index)
        for (_, placed), (_, taken) in zip(there, here, strict=True):
            for into_box, mine_box in messages(placed, taken, num_bytes(after.dtype)):
                given = None if mine is None or rank != move.source else view_box(mine.detach(), mine_box)
                taker = None if into is None or rank != move.target else view_box(into.detach(), into_box)
                _pass(given, taker, move)


def _transfers(resharding: Reshard, before: ParamSpec, after: ParamSpec) -> Iterator[Transfer]:
    """Iterate over the transfers of a tensor; a number without axes goes to each rank from the first."""
    targets = range(resharding.target.mesh.num_ranks)
    if after.orig_shape == resharding.target.tree[after.path].orig_shape:
        yield from (move for rank in targets for move in resharding.of(after.path, rank))
        return
    ((first, _),) = holders(before, resharding.source.mesh)
    for rank in targets:
        if resharding.target.mesh.coordinate(rank).pipe in after.places(resharding.target.mesh):
            yield Transfer(after.path, whole_index(after.orig_shape), first, rank)


def _pass(given: Tensor | None, taker: Tensor | None, move: Transfer) -> None:
    """Send, receive or copy one message."""
    if given is not None and taker is not None:
        taker.copy_(given)
    elif given is not None:
        dist.send(as_message(given), dst=move.target)
    elif taker is not None:
        taker.copy_(receive(tuple(taker.shape), taker.dtype, move.source))


def _received(
    resharding: Reshard, known: Iterable[TensorState], states: LocalStates, after: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Transfer the states; return those of the tensors that this rank holds afterwards, by path and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for state in known:
        path = state.spec.path
        target = evolve(resharding.target.tree[path], dtype=state.spec.dtype)
        if state.spec.orig_shape != target.orig_shape:
            target = evolve(target, orig_shape=(), shards=())
        into: Tensor | None = None
        if path in after:
            shape = after[path].shape if target.orig_shape else ()
            into = torch.zeros(shape, dtype=getattr(torch, target.dtype), device=after[path].device)
            found.setdefault(path, {})[state.name] = into
        _move(resharding, state.spec, target, states.tensors.get(state.key), into)
    return found
