"""``shardplan explain``."""

from __future__ import annotations

from pathlib import Path

import click

from .explanation import explain
from .option_types import FILE, read_plan
from .output import echo, echo_json


@click.command(
    "explain",
    epilog="""\b
Examples:
  shardplan explain plan.json model.layers.0.self_attn.q_proj.weight
  shardplan explain plan.json lm_head.weight --json

\b
Exit codes: 0 explained, 2 there is no such plan, or no such tensor in it.
""",
)
@click.argument("plan", type=FILE)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(plan: Path, path: str, *, as_json: bool) -> None:
    """Print why the tensor PATH is where it is: its line in your code, its values, what each rank holds of it."""
    explanation = explain(read_plan(plan), path)
    if as_json:
        echo_json(explanation)
    else:
        echo(str(explanation))
