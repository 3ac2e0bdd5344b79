"""``shardplan search``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ...specs.errors import PlanError, Problem
from ...specs.mesh import Mesh
from .option_types import BYTES
from .output import echo, echo_json
from .plan import ModelOptions, RuntimeOptions, asks_for_a_model, asks_for_a_runtime

if TYPE_CHECKING:
    from ..schedule import Schedule
    from .model_sources import ScheduleSource


@click.command(
    "search",
    epilog="""\b
Examples:
  shardplan search --hf-config path/to/llama --num-ranks 64 --device-memory 80GiB --ranks-per-node 8
  shardplan search --factory train:schedule --num-ranks 16 --device-memory 24GiB --batch 1 --sequence 4096

\b
Exit codes: 0 some mesh fits, 1 none does, 2 something is wrong with what was given.
""",
)
@asks_for_a_model
@asks_for_a_runtime
@click.option("--num-ranks", type=click.IntRange(min=1), required=True, help="Ranks of each mesh that is tried.")
@click.option("--device-memory", type=BYTES, required=True, help="Memory of one device, such as 80GiB.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Ranks that share a node.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    model: ModelOptions,
    runtime: RuntimeOptions,
    num_ranks: int,
    device_memory: int,
    ranks_per_node: int | None,
    as_json: bool,
) -> None:
    """Plan and audit every mesh of a number of ranks, and print which fit, the best first."""
    source = model.source()
    from ..search import search
    from .model_sources import read_config

    has_inputs = model.batch is not None or model.sequence is not None
    inputs = source.example_inputs(_any_schedule(source, num_ranks)) if has_inputs else None
    found = search(
        source.schedule,
        num_ranks=num_ranks,
        device_memory=device_memory,
        ranks_per_node=ranks_per_node,
        target=runtime.target,
        config=read_config(runtime.config),
        example_inputs=inputs,
    )
    if as_json:
        echo_json(found)
    else:
        echo(str(found))
    if found.best is None:
        ctx.exit(1)


def _any_schedule(source: ScheduleSource, num_ranks: int) -> Schedule:
    """Return the schedule of the first mesh that the user's function accepts, for the sake of its model.

    Raises:
        PlanError: If it accepts no mesh.
    """
    from ..search import meshes

    problems: list[Problem] = []
    for mesh in (Mesh(), *meshes(num_ranks)):
        try:
            return source.schedule(mesh)
        except PlanError as error:
            problems += error.problems
    raise PlanError(problems)
