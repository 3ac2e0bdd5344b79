"""The process group around a plan: this process's coordinate, and the agreement of all ranks that they can go on."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from attrs import astuple, fields

from ...specs.errors import PlanError, Problem
from ...specs.mesh import Mesh
from ...specs.receipt import AGREEMENT_BYTES
from ...specs.steps import MakeGroups

if TYPE_CHECKING:
    from ...specs.mesh import Coordinate
    from ...specs.plan import Plan

_NUM_WORDS = AGREEMENT_BYTES // 8
_TEXT_BYTES = 8192
_NUM_SIZES = len(fields(Mesh))


class ExecutionError(RuntimeError):
    """The first error of any rank while a plan is executed, raised on every rank."""


def own_coordinate(plan: Plan) -> tuple[Coordinate, BaseException | None]:
    """Return this process's coordinate, and an error if the world size is wrong: then the coordinate is a stand-in.

    Raises:
        PlanError: If the plan needs a process group and there is none.
    """
    num_ranks = plan.mesh.num_ranks
    if not dist.is_initialized():
        needs_group = any(isinstance(step, MakeGroups) for step in plan.steps) or (plan.pipeline and plan.target)
        if num_ranks == 1 and not needs_group:
            return plan.mesh.coordinate(0), None
        whose = f"{_ranks(num_ranks)}{f' of {plan.target}' if plan.target else ''}"
        cause = f"the plan is for {whose}, and there is no process group"
        fix = f"torchrun --nproc-per-node {num_ranks} ..., and torch.distributed.init_process_group() before execute"
        raise PlanError([Problem("", cause, fix)])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == num_ranks:
        return plan.mesh.coordinate(rank), None
    problem = Problem(
        "", f"the plan is for {_ranks(num_ranks)} ({plan.mesh}), and the process group has {world_size}", "Plan again"
    )
    return plan.mesh.coordinate(rank % num_ranks), PlanError([problem])


def agree(plan: Plan, error: BaseException | None, device: torch.device) -> None:
    """Return if every rank has the same plan and no error; else raise the first rank's error on every rank.

    One ``all_gather`` of 128 bytes a rank; the text of an error takes one ``broadcast`` more.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    mine = torch.tensor(_words(plan, error), dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    table = torch.stack(gathered).tolist()
    failed = next((rank for rank, words in enumerate(table) if words[0]), None)
    different = next((rank for rank, words in enumerate(table) if words[1:] != table[0][1:]), None)
    if different is not None:
        msg = f"the ranks do not have the same plan: {_difference(table, different)}"
        raise ExecutionError(msg) from error
    if failed is not None:
        msg = f"rank {failed}: {_text(error, failed, device)}"
        raise ExecutionError(msg) from error


def _ranks(num: int) -> str:
    return f"{num} rank{'s' if num > 1 else ''}"


def _words(plan: Plan, error: BaseException | None) -> list[int]:
    """Return the integers that a rank tells: whether it failed, the mesh, the seed, and digests of the plan."""
    digest = bytes.fromhex(plan.fingerprint)
    whole = [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in range(0, len(digest), 8)]
    texts = plan.canonical_fields
    parts = [_digest(texts["tree"]), _digest(texts["steps"]), _digest(texts["target"] + texts["config"])]
    words = [int(error is not None), *astuple(plan.mesh), plan.seed % 2**63, *parts, *whole]
    return words + [0] * (_NUM_WORDS - len(words))


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _difference(table: list[list[int]], rank: int) -> str:
    (_, *first), (_, *other) = table[0], table[rank]
    sizes, other_sizes = first[:_NUM_SIZES], other[:_NUM_SIZES]
    if sizes != other_sizes:
        return f"rank 0 has {Mesh(*sizes)}, rank {rank} has {Mesh(*other_sizes)}"
    (seed, *parts), (other_seed, *other_parts) = first[_NUM_SIZES:], other[_NUM_SIZES:]
    if seed != other_seed:
        return f"rank 0 has seed {seed}, rank {rank} has seed {other_seed}"
    names = ["its tensors", "its steps", "its target or config"]
    found = [name for name, a, b in zip(names, parts, other_parts, strict=False) if a != b]
    return f"rank {rank} differs from rank 0 in {' and '.join(found) or 'its contents'}"


def _text(error: BaseException | None, rank: int, device: torch.device) -> str:
    """Return the text of the failed rank's error on every rank."""
    room = torch.zeros(_TEXT_BYTES, dtype=torch.uint8, device=device)
    if dist.get_rank() == rank:
        assert error is not None, "this rank said that it failed"
        words = f"{type(error).__name__}: {_said(error)}".encode()[:_TEXT_BYTES]
        room[: len(words)] = torch.frombuffer(bytearray(words), dtype=torch.uint8).to(device)
    dist.broadcast(room, src=rank)
    return bytes(room.cpu().tolist()).rstrip(b"\0").decode(errors="replace")


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failed:  # noqa: BLE001  an error that cannot be printed must still reach the other ranks
        return f"(its text cannot be made: {type(failed).__name__})"
