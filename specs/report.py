"""What the audit found out: printed for a person, asked by a program."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from .dtypes import human_bytes
from .mesh import Mesh, MeshAxis

Severity = Literal["error", "warning"]


@frozen
class Finding:
    """One thing that the audit has to say.

    Args:
        severity: ``error`` keeps the plan from being executed, ``warning`` does not.
        path: Tensor or module that it is about; ``""`` for the plan as a whole.
        cause: What is so.
        fix: The nearest mend.
    """

    severity: Severity
    path: str
    cause: str
    fix: str = ""

    def __str__(self) -> str:
        head = f"{self.severity}  {self.path or '(plan)'}: {self.cause}"
        return f"{head}\n         {self.fix}" if self.fix else head


@frozen
class Share:
    """What the ranks at one stage and one tensor coordinate hold, after the plan is executed.

    Args:
        stage: Pipeline stage.
        tensor: Place along the mesh axis ``tensor``.
        parameter_bytes: Bytes of parameters on one such rank.
        buffer_bytes: Bytes of buffers on one such rank.
        replicated_bytes: Bytes of parameters and buffers among them that every rank of the stage holds alike.
        peak_bytes: Most bytes allocated at one time while executing, the worst of these ranks.
    """

    stage: int
    tensor: int
    parameter_bytes: int
    buffer_bytes: int
    replicated_bytes: int
    peak_bytes: int


@frozen
class Traffic:
    """Messages of one kind while the plan is executed, as the first rank of a stage sees them.

    Args:
        stage: Pipeline stage.
        op: ``all_gather``, ``broadcast`` or ``scatter``.
        mesh_axes: Mesh axes that the groups span; empty for all ranks.
        num_calls: Messages.
        num_bytes: Bytes that each member of a group gets, all messages together.
    """

    stage: int
    op: str
    mesh_axes: tuple[MeshAxis, ...]
    num_calls: int
    num_bytes: int


@frozen
class Boundary:
    """What crosses from one pipeline stage to the next for one micro-batch of the size of the example inputs.

    Args:
        stage: The stage that sends; the next one receives.
        num_tensors: Tensors.
        num_bytes: Bytes of all of them, on one rank.
        gradient_bytes: Bytes of the gradients that come back.
    """

    stage: int
    num_tensors: int
    num_bytes: int
    gradient_bytes: int


@frozen
class Report:
    """What each rank will hold, send and risk.

    Args:
        title: The plan in one line.
        mesh: The plan's mesh.
        shares: Memory, a row for each stage and tensor coordinate.
        traffic: Messages of execution.
        replicated: Tensors that every rank of their stage holds whole, largest first: path, printed type, bytes.
        findings: What may hurt.
        boundaries: What crosses between pipeline stages in training.
    """

    title: str
    mesh: Mesh
    shares: tuple[Share, ...]
    traffic: tuple[Traffic, ...]
    replicated: tuple[tuple[str, str, int], ...]
    findings: tuple[Finding, ...] = ()
    boundaries: tuple[Boundary, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the plan may be executed: no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def __str__(self) -> str:
        lines = [self.title, "", "holds   stage  tensor  parameters     buffers  replicated  peak while executing"]
        lines += [
            f"        {s.stage:>5}  {s.tensor:>6}  {human_bytes(s.parameter_bytes):>10}  {human_bytes(s.buffer_bytes):>10}"
            f"  {human_bytes(s.replicated_bytes):>10}  {human_bytes(s.peak_bytes):>20}"
            for s in self.shares
        ]
        lines += ["", "sends   stage  over           op          messages  bytes to each rank"]
        lines += [
            f"        {t.stage:>5}  {' x '.join(t.mesh_axes) or 'all ranks':<13}  {t.op:<10}"
            f"  {t.num_calls:>8}  {human_bytes(t.num_bytes):>18}"
            for t in self.traffic
        ] or ["        nothing"]
        if self.boundaries:
            lines += ["", "crosses from  to  tensors  bytes a micro-batch  of gradients back"]
            lines += [
                f"        {b.stage:>4}  {b.stage + 1:>2}  {b.num_tensors:>7}  {human_bytes(b.num_bytes):>19}"
                f"  {human_bytes(b.gradient_bytes):>17}"
                for b in self.boundaries
            ]
        if self.replicated:
            total = sum(num_bytes for *_, num_bytes in self.replicated)
            lines += [
                "",
                f"whole   {len(self.replicated)} tensors of {human_bytes(total)} on every rank of their stage; the largest:",
            ]
            lines += [f"        {path}  {type_}  {human_bytes(num_bytes)}" for path, type_, num_bytes in self.replicated[:3]]
        lines += ["", *(str(finding) for finding in self.findings)] if self.findings else []
        return "\n".join([*lines, "", f"ok      {'yes' if self.ok else 'no: execute refuses this plan'}"])
