"""The report of an audit: printed for a person, asked by a program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from .distinct_ranks import Distinct
from .dtypes import human_bytes
from .equality import Trust, in_words
from .file_reads import FileRead, rows, total_bytes
from .finding import Finding, Silenced, folded
from .fold_layers import fold
from .listing import trusted
from .memory import Memory, Share
from .mesh import STAGE_AXES, Mesh
from .proof import Proof
from .stored import Folder
from .text_table import ranges, table
from .traffic import Boundary, StepTraffic, Traffic

if TYPE_CHECKING:
    from .proof import Law

_COLUMNS = (
    ("parameters", "parameter_bytes"),
    ("buffers", "buffer_bytes"),
    ("gradients", "gradient_bytes"),
    ("optimizer", "optimizer_bytes"),
    ("master", "master_bytes"),
    ("buckets", "bucket_bytes"),
    ("boundary", "boundary_bytes"),
    ("training", "training_bytes"),
    ("activations~", "activation_bytes"),
    ("checkpointed~", "checkpointed_bytes"),
    ("executing", "executing_bytes"),
)
_ALWAYS = ("parameters", "buffers", "training", "executing")
_FEW = 3
_TOO_LARGE = "SP030"


@frozen
class Report:
    """Memory, messages, proofs and findings of all ranks.

    Args:
        title: The plan in a line.
        mesh: The plan's mesh.
        distinct: Which ranks are alike.
        shares: Memory, for each distinct coordinate in the order of ranks.
        execution: Messages while the plan is executed, for each distinct coordinate.
        training: Messages of a training step.
        boundaries: Tensors that cross between pipeline stages for a micro-batch.
        replicated: Tensors that every rank of their stage holds whole, largest first: path, printed type, bytes.
        proofs: Proofs of the laws, with their failures.
        reads: Bytes read while the plan is executed, for each distinct coordinate by file.
        folder: The files; None if the plan reads none.
        findings: Findings that are not silenced.
        silenced: Silenced findings, with reasons.
        trusts: Modules that nobody could follow and that the user trusts, with reasons.
        num_microbatches: Micro-batches of a training step, on a rank.
        ranks_per_node: Ranks that share a node and its host memory; None if nobody said.
        device_memory: Bytes of a device; None if nobody said.
    """

    title: str
    mesh: Mesh
    distinct: Distinct
    shares: tuple[Share, ...]
    execution: tuple[Traffic, ...]
    training: tuple[StepTraffic, ...]
    boundaries: tuple[Boundary, ...]
    replicated: tuple[tuple[str, str, int], ...]
    proofs: tuple[Proof, ...]
    reads: tuple[FileRead, ...] = ()
    folder: Folder | None = None
    findings: tuple[Finding, ...] = ()
    silenced: tuple[Silenced, ...] = ()
    trusts: tuple[Trust, ...] = ()
    num_microbatches: int = 1
    ranks_per_node: int | None = None
    device_memory: int | None = None

    @property
    def ok(self) -> bool:
        """Whether no finding is an error. It proves nothing: what could not be followed is in ``proof("equal")``."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def is_refused(self) -> bool:
        """Whether ``execute`` refuses the plan: an error other than too little memory, as it is told of no device's."""
        return any(finding.severity == "error" and finding.code != _TOO_LARGE for finding in self.findings)

    def memory(self, rank: int) -> Memory:
        """Return a rank's memory; where ZeRO 2 leaves alike ranks different gradients, the fullest rank's.

        Raises:
            IndexError: For a rank outside the mesh.
        """
        alike = self.distinct.like(self.mesh.coordinate(rank))
        return next(share.memory for share in self.shares if share.coordinate == alike)

    def proof(self, law: Law) -> Proof:
        """Return the proof of a law, by its name."""
        return next(proof for proof in self.proofs if proof.law == law)

    @property
    def worst(self) -> Share:
        """The ranks that need the most memory."""
        return max(self.shares, key=lambda share: share.memory.peak_bytes)

    @property
    def host_peak_bytes(self) -> int | None:
        """Most bytes of host memory that the processes of a node take for the values of the user's model.

        A model on meta takes none. If tensors go to the CPU, the shards of the ranks come on top. None without
        ``ranks_per_node``.
        """
        if self.ranks_per_node is None:
            return None
        return min(self.ranks_per_node, self.mesh.num_ranks) * max(share.memory.host_bytes for share in self.shares)

    def __str__(self) -> str:
        lines = [self.title, "", *_head("holds", self._holds())]
        if self.host_peak_bytes:
            told = "in host memory of each node, for the values that the model came with"
            lines += [f"        {human_bytes(self.host_peak_bytes)} {told}"]
        if self.folder is not None:
            lines += ["", *_head("reads", rows(self.reads)), f"        {self._together(self.folder)}"]
        lines += ["", *_head("sends", self._sends())]
        if self.training:
            lines += ["", *_head("step", self._steps())]
        if self.boundaries:
            lines += ["", *_head("crosses", self._crosses())]
        if self.replicated:
            total = sum(num_bytes for *_, num_bytes in self.replicated)
            largest = [f"        {path}  {type_}  {human_bytes(size)}" for path, type_, size in self.replicated[:_FEW]]
            count = f"{len(self.replicated)} tensors of {human_bytes(total)} on every rank of their stage; the largest:"
            lines += ["", f"whole   {count}", *largest]
        proofs = [line for proof in self.proofs for line in str(proof).splitlines()]
        lines += ["", *(f"{'proofs' if not number else '':<8}{line}" for number, line in enumerate(proofs))]
        lines += ["", *map(str, folded(self.findings))] if self.findings else []
        quiet = fold((s.finding.path, (s.finding.code, s.reason)) for s in self.silenced)
        lines += ["", *(f"silenced  {code} {path or '(plan)'}: {reason}" for path, (code, reason) in quiet)] if quiet else []
        return "\n".join([*lines, *trusted(self.trusts), "", f"ok      {self.verdict}"])

    @property
    def verdict(self) -> str:
        """The verdict of all findings in a few words, and whether the law ``equal`` is proven."""
        if self.ok:
            return self._proven
        if self.is_refused:
            return "no: execute refuses this plan"
        return "no: it needs more memory than a device has, for which execute does not look"

    @property
    def _proven(self) -> str:
        equal = self.proof("equal")
        if equal.holds:
            return "yes, equal proven"
        first, *more = in_words(equal.unfollowed)
        return f"yes, but equal not followed: {first}{f', and {len(more)} more' if more else ''}"

    def _holds(self) -> Iterator[tuple[str, ...]]:
        alike: dict[tuple[int, Memory], list[Share]] = {}
        for share in self.shares:
            alike.setdefault((share.coordinate.pipe, share.memory), []).append(share)
        shown = [
            (name, field)
            for name, field in _COLUMNS
            if name in _ALWAYS or any(getattr(memory, field) for _, memory in alike)
        ]
        yield "stage", "ranks", "first", *(name for name, _ in shown)
        rows: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        for (stage, memory), shares in alike.items():
            sizes = (human_bytes(getattr(memory, field) or 0) for _, field in shown)
            num = sum(share.num_ranks for share in shares)
            rows.setdefault((str(num), *sizes), []).append((stage, shares[0].coordinate.rank))
        for (num, *sizes), places in rows.items():
            stages = [stage for stage, _ in places]
            yield ranges(stages), str(int(num) * len(stages)), str(places[0][1]), *sizes

    def _together(self, folder: Folder) -> str:
        size = sum(file.num_bytes for file in folder.files)
        files = f"{len(folder.files)} file{'s' if len(folder.files) > 1 else ''} of {human_bytes(size)}"
        return f"all ranks together read {human_bytes(total_bytes(self.reads))} from {folder.path}, {files}"

    def _sends(self) -> Iterator[tuple[str, ...]]:
        yield "stage", "over", "op", "messages", "bytes to each rank"
        yield from _by_stage(
            (
                row.coordinate.pipe,
                (" x ".join(row.mesh_axes) or "all ranks", row.op, str(row.num_calls), human_bytes(row.num_bytes)),
            )
            for row in self.execution
            if row.coordinate.is_first(*STAGE_AXES)
        )

    def _steps(self) -> Iterator[tuple[str, ...]]:
        nodes = ("inside", "between nodes") if self.ranks_per_node else ("on the wire",)
        yield "stage", "over", "what", "op", "messages", "bytes", *nodes
        rows: list[tuple[int, tuple[str, ...]]] = []
        for row in self.training:
            parts = (row.inside_bytes, row.between_bytes) if self.ranks_per_node else (row.wire_bytes,)
            sizes = map(human_bytes, (row.num_bytes, *parts))
            rows.append((row.stage, (row.mesh_axis, row.cargo, row.op, str(row.num_calls), *sizes)))
        yield from _by_stage(rows)

    def _crosses(self) -> Iterator[tuple[str, ...]]:
        yield "after stage", "tensors", "bytes a micro-batch", "of gradients back"
        yield from _by_stage(
            (b.stage, (str(b.num_tensors), human_bytes(b.num_bytes), human_bytes(b.gradient_bytes))) for b in self.boundaries
        )


def _by_stage(rows: Iterable[tuple[int, tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """Fold rows that are alike on several stages."""
    stages: dict[tuple[str, ...], list[int]] = {}
    for stage, cells in rows:
        stages.setdefault(cells, []).append(stage)
    for cells, numbers in stages.items():
        yield (ranges(numbers), *cells)


def _head(name: str, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Write a table after its name; numbers are aligned on the right."""
    lines = table(rows, right=True)
    yield f"{name:<8}{lines[0]}"
    yield from (f"        {line}" for line in lines[1:] or ["nothing"])
