"""``shardplan plan``."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from attrs import fields, frozen

from ...specs.checkpoint import Checkpoint
from ...specs.codec import dumps
from ...specs.errors import PlanError, Problem
from .option_types import FILE, MESH
from .output import echo_json, write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...specs.mesh import Mesh
    from .model_sources import ScheduleSource


@frozen
class ModelOptions:
    """The options that name the model and its example inputs."""

    factory: str | None
    hf_config: Path | None
    batch: int | None
    sequence: int | None

    def source(self, *, small: bool = False) -> ScheduleSource:
        """Return the source of schedules.

        Args:
            small: Whether they are for a small model of the same structure.

        Raises:
            UsageError: If both or neither of ``--factory`` and ``--hf-config`` are given.
        """
        if (self.factory is None) == (self.hf_config is None):
            msg = "Give one of --factory module:function and --hf-config folder."
            raise click.UsageError(msg)
        from .model_sources import from_config, from_factory

        if self.factory is not None:
            return from_factory(self.factory, self.batch, self.sequence, small=small)
        assert self.hf_config is not None, "one of the two is given"
        return from_config(self.hf_config, self.batch, self.sequence, small=small)


@frozen
class RuntimeOptions:
    """The options that name the runtime."""

    target: str | None
    config: Path | None


def _asks_for(record: type, argument: str, options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """Return a decorator that adds options, which the command gets in a record as one argument."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(*args: Any, **given: Any) -> None:
            packed = record(**{field.name: given.pop(field.name) for field in fields(record)})
            function(*args, **{argument: packed}, **given)

        for option in reversed(options):
            command = option(command)
        return command

    return decorate


asks_for_a_model = _asks_for(
    ModelOptions,
    "model",
    [
        click.option("--factory", metavar="MODULE:FUNCTION", help="Your function from a mesh to a schedule."),
        click.option(
            "--hf-config",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Configuration of a transformers model, a folder or config.json; nothing is downloaded.",
        ),
        click.option("--batch", type=click.IntRange(min=1), help="Batch of the example inputs: one micro-batch of a rank."),
        click.option("--sequence", type=click.IntRange(min=1), help="Their length, in tokens."),
    ],
)

asks_for_a_runtime = _asks_for(
    RuntimeOptions,
    "runtime",
    [
        click.option("--target", metavar="NAME", help="Runtime that takes the module: deepspeed, torch. [default: none]"),
        click.option("--config", type=FILE, help="The target's configuration, a JSON file."),
    ],
)


@click.command(
    "plan",
    epilog="""\b
Examples:
  shardplan plan --factory train:schedule --mesh data=2,tensor=4 -o plan.json
  shardplan plan --hf-config path/to/llama --mesh pipe=2,tensor=4 --batch 2 --sequence 4096 -o plan.json
  shardplan plan --hf-config path/to/llama --mesh data=8,tensor=8 --target deepspeed --config ds.json -o plan.json
  shardplan plan --hf-config path/to/llama --mesh data=8,tensor=8 --checkpoint path/to/llama --dedupe -o plan.json

\b
The split model is followed beside the whole one on short inputs that are made from the configuration of a transformers
model; with --batch and --sequence on inputs of these sizes, so that the audit knows traffic and activations too. A
pipeline needs them. Without -o the plan is printed.

\b
Exit codes: 0 planned, 2 the schedule or what was given is wrong; all problems are on stderr.
""",
)
@asks_for_a_model
@asks_for_a_runtime
@click.option("--mesh", type=MESH, required=True, help="The ranks: pipe=2,data=4,tensor=8,expert=2; what is left out is 1.")
@click.option("--seed", type=int, default=0, show_default=True, help="What all random numbers derive from.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "local", "scatter", "broadcast"]),
    default="auto",
    show_default=True,
    help="How values come to their ranks.",
)
@click.option("--checkpoint", metavar="FOLDER", help="Weights to start from: Hugging Face, DCP, DeepSpeed's universal.")
@click.option("--dedupe", is_flag=True, help="Ranks along data read each weight of --checkpoint once, and broadcast it.")
@click.option("-o", "--output", type=FILE, help="File for the plan's JSON.")
@click.option("--json", "as_json", is_flag=True, help="With -o: print what was written as JSON.")
def command(
    *,
    model: ModelOptions,
    runtime: RuntimeOptions,
    mesh: Mesh,
    seed: int,
    strategy: Literal["auto", "local", "scatter", "broadcast"],
    checkpoint: str | None,
    dedupe: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Plan a model for a mesh, on this machine, without a device: from your own schedule, or from a configuration."""
    if mesh.pipe > 1 and model.batch is None:
        cause = f"{mesh} has stages, and a model is cut by following it on example inputs"
        raise PlanError([Problem("--mesh", cause, "Give their sizes: --batch 2 --sequence 128")])
    if dedupe and checkpoint is None:
        raise PlanError([Problem("--dedupe", "it is for --checkpoint, which is not given", "Give --checkpoint FOLDER")])
    source = model.source()
    from ..plan import plan_build
    from .model_sources import read_config

    sch = source.schedule(mesh)
    plan = plan_build(
        sch,
        target=runtime.target,
        config=read_config(runtime.config),
        seed=seed,
        strategy=strategy,
        init_weights=True if checkpoint is None else Checkpoint(checkpoint, dedupe=dedupe),
        example_inputs=source.example_inputs(sch),
    )
    text = dumps(plan)
    if output is None:
        click.echo(text)
        return
    write(output, f"{text}\n")
    about: dict[str, Any] = {"file": str(output), "fingerprint": plan.fingerprint, "num_tensors": len(plan.tree)}
    if as_json:
        echo_json({"ok": True, **about, "mesh": plan.mesh})
    else:
        click.echo(f"{output}  plan {plan.fingerprint[:12]}, {mesh}, {len(plan.tree)} tensors")
