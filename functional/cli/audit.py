"""``shardplan audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from attrs import fields

from ...specs.codec import as_plain
from ...specs.dtypes import human_bytes
from ...specs.errors import PlanError, Problem
from ...specs.memory import Memory
from ...specs.mesh import MESH_AXES
from ...specs.text_table import table
from ..audit import audit
from ..dialects import dialect_of
from ..interpreter.dry_run import predict
from .option_types import BYTES, FILE, load_plan
from .output import echo, echo_json, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...specs.plan import Plan
    from ...specs.report import Report


@click.command(
    "audit",
    epilog="""\b
Examples:
  shardplan audit plan.json
  shardplan audit plan.json --device-memory 80GiB --ranks-per-node 8 --fail-on warning
  shardplan audit plan.json --rank 1234
  shardplan audit plan.json --html report.html

\b
Exit codes: 0 all is well, 1 there are findings of the kind that --fail-on names, 2 something is wrong with what was given.
""",
)
@click.argument("plan", type=FILE)
@click.option("--device-memory", type=BYTES, help="Memory of one device, such as 80GiB; more is an error.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Ranks that share a node.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "never"]),
    default="error",
    show_default=True,
    help="The least finding with which the exit code is 1.",
)
@click.option("--rank", type=click.IntRange(min=0), help="Also print what this rank does and the fullest of its kind holds.")
@click.option("--html", type=FILE, help="Also write the report as a page.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    plan: Path,
    device_memory: int | None,
    ranks_per_node: int | None,
    fail_on: Literal["error", "warning", "never"],
    rank: int | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print what each rank will hold, send and risk. No torch, no device, for any number of ranks."""
    loaded = load_plan(plan)
    if rank is not None and rank >= loaded.mesh.num_ranks:
        cause = f"rank {rank} is not on {loaded.mesh}"
        raise PlanError([Problem("--rank", cause, f"Its ranks are 0 to {loaded.mesh.num_ranks - 1}")])
    report = audit(loaded, ranks_per_node=ranks_per_node, device_memory=device_memory)
    if html is not None:
        from ..auditing.html.report import html_report

        write(html, html_report(loaded, report))
    if as_json:
        of_rank = {} if rank is None else {"rank": _rank_json(loaded, report, rank)}
        echo_json(
            {
                "ok": report.ok,
                "equal": report.proof("equal").answer,
                "fingerprint": loaded.fingerprint,
                **as_plain(report),
                **of_rank,
            }
        )
    else:
        echo(str(report))
        if rank is not None:
            echo("\n" + "\n".join(_rank(loaded, report, rank)))
    if _fails(report, fail_on):
        ctx.exit(1)


def _fails(report: Report, fail_on: Literal["error", "warning", "never"]) -> bool:
    match fail_on:
        case "never":
            return False
        case "warning":
            return bool(report.findings)
        case "error":
            return not report.ok


def _rank(plan: Plan, report: Report, rank: int) -> Iterator[str]:
    """Iterate over lines on the memory of a rank, and on its receipt."""
    memory, receipt = report.memory(rank), predict(plan, rank)
    here = plan.mesh.coordinate(rank)
    yield f"rank {rank}  {' '.join(f'{mesh_axis}={here.index(mesh_axis)}' for mesh_axis in MESH_AXES)}"
    names = [name for name in _names() if getattr(memory, name) is not None]
    rows = ((name.removesuffix("_bytes").replace("_", " "), human_bytes(getattr(memory, name))) for name in names)
    yield from (f"  {line}" for line in table([("holds", "bytes"), *rows], right=True))
    if uneven := dialect_of(plan.target).training(plan).uneven_state:
        yield f"  {uneven}"
    yield (
        f"  executing: {receipt.num_tensors} tensors, peak {human_bytes(receipt.peak_bytes)},"
        f" {len(receipt.collectives)} collectives of {human_bytes(receipt.received_bytes)}, {receipt.num_groups} groups"
    )


def _rank_json(plan: Plan, report: Report, rank: int) -> dict[str, object]:
    memory = report.memory(rank)
    return {
        "rank": rank,
        "coordinate": as_plain(plan.mesh.coordinate(rank)),
        "memory": {**as_plain(memory), "peak_bytes": memory.peak_bytes},
        "receipt": as_plain(predict(plan, rank)),
    }


def _names() -> list[str]:
    return [*(field.name for field in fields(Memory)), "training_bytes", "peak_bytes"]
