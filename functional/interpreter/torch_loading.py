"""Tensors of one rank read from files, and the sums by which all ranks check what they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from attrs import Factory, define

from ...specs.errors import PlanError
from ...specs.index import whole_index
from ...specs.ownership import held_first
from ...specs.source import Materialised
from ...specs.stored import Folder, Part
from ..checkpoints.byte_ranges import select, select_all, staging_bytes, stored_parts
from ..checkpoints.checksum import MODULUS
from ..checkpoints.expected_checksums import expected_sums, wrong_sums
from ..checkpoints.formats.manifest import read_manifest
from ..checkpoints.formats.rank_file import damaged, read_rank_file, wrong_tensors
from ..checkpoints.reader import Files, ReadRequest, read_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ...specs.mesh import Coordinate
    from ...specs.plan import Plan
    from . import work
    from .ledger import Ledger

Key = TypeVar("Key")


@define
class Loading:
    """Reads tensors for one rank.

    Args:
        coordinate: The rank's coordinate.
        ledger: The rank's ledger, for bytes read and staged.
        sums: Position sums of the elements read that count on this rank, by tensor and number among its stored parts.
    """

    coordinate: Coordinate
    ledger: Ledger
    sums: dict[tuple[str, int], int] = Factory(dict)

    def read_shards(self, tensors: Sequence[Tensor], pieces: Sequence[work.Piece], folder: Folder) -> None:
        """Fill tensors, without their padding, with their pieces from a folder."""
        requests: dict[tuple[str, int], ReadRequest] = {}
        for out, piece in zip(tensors, pieces, strict=True):
            first = held_first(piece.spec, self.coordinate)
            for number, part in enumerate(stored_parts(piece.spec)):
                if selection := select(part, piece.index):
                    counted = select(part, first) if first is not None and part.stored.sum is not None else None
                    requests[piece.path, number] = ReadRequest(out, selection, counted and counted.entries)
        self.sums.update(self._read(requests, folder))

    def read_own(self, tensors: Sequence[Tensor], pieces: Sequence[work.Piece], folder: Folder) -> None:
        """Fill tensors from the file that was written for this rank alone.

        Raises:
            PlanError: If the file holds other tensors, or its values are damaged.
        """
        own, file, stored = read_rank_file(folder.path, self.coordinate.rank, _written_for(pieces[0]))
        if problems := wrong_tensors(file.name, [(p.path, p.spec.dtype, p.shape) for p in pieces], stored):
            raise PlanError(problems)
        requests = {
            piece.path: ReadRequest(out, selection, selection.entries)
            for out, piece in zip(tensors, pieces, strict=True)
            for selection in select_all([Part.whole(stored[piece.path])], whole_index(piece.shape))
        }
        if problems := damaged(file.name, own, self._read(requests, Folder(folder.path, (file,)))):
            raise PlanError(problems)
        self.sums.update(own.loaded)

    def check(self, plan: Plan, device: torch.device, *, failed: bool) -> None:
        """Add up the sums of all ranks, and compare them with the recorded sums unless any rank has failed before.

        Raises:
            PlanError: If a stored tensor's sum differs.
        """
        known = expected_sums(plan.tree)
        own = [sum(self.sums.get(part, 0) for part in stored.counting) for stored in known.values()]
        words = torch.tensor([*map(_signed, own), int(failed)], dtype=torch.int64, device=device)
        if plan.mesh.num_ranks > 1:
            dist.all_reduce(words)
            self.ledger.call("all_reduce", (), range(plan.mesh.num_ranks), words.nbytes)
        *sums, num_failed = words.tolist()
        found = {name: word % MODULUS for name, word in zip(known, sums, strict=True)}
        if not num_failed and any(found[name] != stored.sum for name, stored in known.items()):
            raise PlanError(list(wrong_sums(known, found, _recorded_now(plan))))

    def _read(self, requests: Mapping[Key, ReadRequest], folder: Folder) -> dict[Key, int]:
        """Read from files; return the sum of each reading."""
        staging = staging_bytes(sum(request.selection.num_bytes for request in requests.values()))
        self.ledger.allocate(staging)
        with Files(folder) as files:
            sums = read_all([*requests.values()], files)
        self.ledger.free(staging)
        for file, num_bytes in files.num_read.items():
            self.ledger.read(file, num_bytes)
        return dict(zip(requests, sums, strict=True))


def _signed(number: int) -> int:
    """Return a number modulo 2^64 as a signed integer of 64 bits."""
    return (number + MODULUS // 2) % MODULUS - MODULUS // 2


def _recorded_now(plan: Plan) -> dict[tuple[str, str], int]:
    """Return the sums that the manifest of the plan's folder records by now, by file and key."""
    manifest = read_manifest(plan.folder.path) if plan.folder else None
    return {(name, key): found for name, sums in manifest.sums.items() for key, found in sums.items()} if manifest else {}


def _written_for(piece: work.Piece) -> str:
    """Return the fingerprint of the plan that the rank's own file was written for."""
    assert isinstance(piece.spec.source, Materialised), "only materialised tensors lie in a rank's own file"
    return piece.spec.source.plan
