"""All ranks tell each other whether they can go on, so that none waits for one that cannot."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from attrs import astuple, fields

from ...specs.mesh import Mesh
from .dry_run import AGREEMENT_BYTES

if TYPE_CHECKING:
    from ...specs.plan import Plan

_NUM_WORDS = AGREEMENT_BYTES // 8
_TEXT_BYTES = 8192
_NUM_SIZES = len(fields(Mesh))


class ExecutionError(RuntimeError):
    """What kept a plan from being carried out: the first error of any rank, raised on every rank."""


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


def _words(plan: Plan, error: BaseException | None) -> list[int]:
    digest = bytes.fromhex(plan.fingerprint)
    whole = [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in range(0, len(digest), 8)]
    fields = plan.canonical_fields
    parts = [_digest(fields["tree"]), _digest(fields["steps"]), _digest(fields["target"] + fields["config"])]
    words = [int(error is not None), *astuple(plan.mesh), plan.seed % 2**63, *parts, *whole]
    return words + [0] * (_NUM_WORDS - len(words))


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _difference(table: list[list[int]], rank: int) -> str:
    ours, theirs = table[0], table[rank]
    (_, *our_sizes), (_, *their_sizes) = ours[: _NUM_SIZES + 1], theirs[: _NUM_SIZES + 1]
    if our_sizes != their_sizes:
        return f"rank 0 has {Mesh(*our_sizes)}, rank {rank} has {Mesh(*their_sizes)}"
    (our_seed, *our_parts), (their_seed, *their_parts) = ours[_NUM_SIZES + 1 :], theirs[_NUM_SIZES + 1 :]
    if our_seed != their_seed:
        return f"rank 0 has seed {our_seed}, rank {rank} has seed {their_seed}"
    names = ["its tensors", "its steps", "its target or config"]
    found = [name for name, a, b in zip(names, our_parts, their_parts, strict=False) if a != b]
    return f"rank {rank} differs from rank 0 in {' and '.join(found) or 'its contents'}"


def _text(error: BaseException | None, rank: int, device: torch.device) -> str:
    """Return the failed rank's own words on every rank."""
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
