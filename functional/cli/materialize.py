"""``shardplan materialize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...specs.dtypes import human_bytes
from ...specs.errors import PlanError, Problem
from .option_types import FILE, RANKS, load_plan
from .output import echo_json

if TYPE_CHECKING:
    from torch import nn

    from ...specs.plan import Plan


@click.command(
    "materialize",
    epilog="""\b
Examples:
  shardplan materialize plan.json --rank 17 -o shards
  shardplan materialize plan.json --rank 16-23 -o shards
  shardplan materialize plan.json --rank 0 -o shards --factory train:schedule

\b
Each rank in turn, in this process alone, so that all ranks of a node need the memory of one. Training starts from the
files by execute(from_shards(plan, "shards")). Values that init code makes, or that the model has, need --factory.

\b
Exit codes: 0 written, 2 something is wrong with what was given.
""",
)
@click.argument("plan", type=FILE)
@click.option("--rank", "ranks", type=RANKS, multiple=True, required=True, help="Whose shards: 17, or 16-23; several times.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for rank-00017.safetensors.",
)
@click.option("--factory", metavar="MODULE:FUNCTION", help="Your function from a mesh to a schedule, for its model.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(plan: Path, *, ranks: tuple[range, ...], output: Path, factory: str | None, as_json: bool) -> None:
    """Write what single ranks will hold, without a process group."""
    loaded = load_plan(plan)
    last = max(several.stop - 1 for several in ranks)
    if last >= loaded.mesh.num_ranks:
        cause = f"there is no rank {last}: {loaded.mesh} has {loaded.mesh.num_ranks}"
        raise PlanError([Problem("--rank", cause, f"0 to {loaded.mesh.num_ranks - 1}")])
    wanted = list(dict.fromkeys(rank for several in ranks for rank in several))
    from ..saving.materialize import materialize

    model = _model(loaded, factory)
    files: list[dict[str, object]] = []
    for rank in wanted:
        try:
            file = materialize(loaded, rank, output, model)
        except OSError as error:
            raise PlanError(
                [Problem(str(output), f"it cannot be written: {error.strerror}", "Give another folder")]
            ) from None
        files.append({"rank": rank, "file": str(file), "num_bytes": file.stat().st_size})
        if not as_json:
            click.echo(f"{file}  rank {rank}, {human_bytes(file.stat().st_size)}")
    if as_json:
        echo_json({"ok": True, "fingerprint": loaded.fingerprint, "files": files})


def _model(plan: Plan, factory: str | None) -> nn.Module | None:
    if factory is None:
        return None
    from .model_sources import from_factory

    return from_factory(factory, None, None).schedule(plan.mesh).runtime.model
