"""``shardplan show``."""

from __future__ import annotations

from pathlib import Path

import click

from ...specs.codec import dumps
from .option_types import FILE, load_plan
from .output import echo


@click.command(
    "show",
    epilog="""\b
Examples:
  shardplan show plan.json
  shardplan show plan.json | grep lm_head

\b
Exit codes: 0 shown, 2 there is no such plan.
""",
)
@click.argument("plan", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the plan's JSON, once it has been checked.")
def command(plan: Path, *, as_json: bool) -> None:
    """Print what every rank will hold: a line a tensor, repeated layers folded."""
    loaded = load_plan(plan)
    if as_json:
        click.echo(dumps(loaded))
    else:
        echo(str(loaded))
