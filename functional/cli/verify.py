"""``shardplan verify``."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ...specs.codec import as_plain
from .option_types import MESH
from .output import echo, echo_json
from .plan import ModelOptions, asks_for_a_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...specs.mesh import Mesh


@click.command(
    "verify",
    epilog="""\b
Examples:
  shardplan verify --factory train:schedule --mesh tensor=2 --shrink
  shardplan verify --hf-config path/to/llama --shrink --mesh data=2,tensor=4
  shardplan verify --factory train:schedule --mesh pipe=2,tensor=2 --batch 6 --sequence 11 --json

\b
The whole model and all ranks run here, in double precision: use a small model. With --shrink a configuration is made small,
and a function is called as function(mesh, small=True) if it takes that. Inputs are made from the model's configuration and
the arguments of its forward; --batch (of all data ranks) and --sequence say their sizes.

\b
Exit codes: 0 the ranks compute what the whole model computes, 1 something differs, 2 something is wrong with what was given.
""",
)
@asks_for_a_model
@click.option("--mesh", type=MESH, required=True, help="The ranks: pipe=2,data=2,tensor=2,expert=2; what is left out is 1.")
@click.option("--shrink", is_flag=True, help="Judge a small model of the same structure.")
@click.option("--steps", type=click.IntRange(min=1), default=1, show_default=True, help="Steps of SGD.")
@click.option("--seed", type=int, default=0, show_default=True, help="What values, inputs and masks derive from.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.pass_context
def command(
    ctx: click.Context, *, model: ModelOptions, mesh: Mesh, shrink: bool, steps: int, seed: int, as_json: bool
) -> None:
    """Run all ranks on this machine beside the whole model, and print what differs and where it begins."""
    source = model.source(small=shrink)
    from ..judging.inputs import inputs_for
    from ..verify import verify

    with _progress():
        sch = source.schedule(mesh)
        comparison = verify(sch, inputs_for(sch, seed, model.batch, model.sequence), steps=steps, seed=seed)
    if as_json:
        echo_json({"ok": comparison.ok, **as_plain(comparison)})
    else:
        echo(str(comparison))
    if not comparison.ok:
        ctx.exit(1)


@contextmanager
def _progress() -> Iterator[None]:
    """Show on stderr, if that is a terminal, what ``verify`` is doing."""
    handler = _Line()
    logger = logging.getLogger("shardplan.verify")
    before = logger.level, logger.propagate
    if sys.stderr.isatty():
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        handler.clear()


class _Line(logging.Handler):
    """Writes messages over each other."""

    width = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        click.echo(f"\r{text:<{self.width}}", err=True, nl=False)
        self.width = len(text)

    def clear(self) -> None:
        if self.width:
            click.echo(f"\r{'':<{self.width}}\r", err=True, nl=False)
