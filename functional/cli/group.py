"""The command group ``shardplan``: loads each command on demand, and prints a ``PlanError`` without a traceback."""

from __future__ import annotations

from importlib import import_module

import click

from ...specs.errors import PlanError

_COMMANDS = ("plan", "show", "audit", "explain", "diff", "search", "verify", "materialize", "completion")


class Mistake(click.ClickException):
    """A mistake that the user can mend: its text on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: object = None) -> None:  # noqa: ARG002  click's signature
        """Print the text."""
        click.echo(self.message, err=True)


class Commands(click.Group):
    """A group of commands, each imported from the module of its name on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return the commands' names, in the order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's signature
        """Return the command of a name; None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        # by name, so that commands without torch do not import those with it
        return import_module(f"..{cmd_name}", __name__).command

    def invoke(self, ctx: click.Context) -> object:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except PlanError as error:
            msg = f"PlanError: {error}"
            raise Mistake(msg) from error


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="""\b
Examples:
  shardplan plan --factory train:schedule --mesh data=4,tensor=8 -o plan.json
  shardplan audit plan.json --device-memory 80GiB --ranks-per-node 8

\b
Exit codes: 0 all is well, 1 the answer is no (audit, search, verify; diff only with --exit-code), 2 something is wrong
with what was given.
Completion of commands and options: shardplan completion bash|zsh|fish.
""",
)
@click.version_option(package_name="shardplan")
def main() -> None:
    """Know exactly what every rank will hold before a single GPU is booked."""
