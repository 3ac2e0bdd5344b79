"""``shardplan diff``."""

from __future__ import annotations

from pathlib import Path

import click

from ..diff import diff
from .option_types import FILE, load_plan
from .output import echo, echo_json


@click.command(
    "diff",
    epilog="""\b
Examples:
  shardplan diff before.json after.json
  shardplan diff before.json after.json --exit-code

\b
Exit codes: 0 compared, 1 they differ and --exit-code is given, 2 there is no such plan.
""",
)
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the plans differ.")
@click.option("--json", "as_json", is_flag=True, help="Print the difference as JSON.")
@click.pass_context
def command(ctx: click.Context, before: Path, after: Path, *, exit_code: bool, as_json: bool) -> None:
    """Print what changes from one plan to another."""
    difference = diff(load_plan(before), load_plan(after))
    if as_json:
        echo_json(difference)
    else:
        echo(str(difference))
    if exit_code and not difference.is_empty:
        ctx.exit(1)
