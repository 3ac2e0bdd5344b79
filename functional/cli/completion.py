"""``shardplan completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    "completion",
    epilog="""\b
Examples:
  shardplan completion bash >> ~/.bashrc
  shardplan completion zsh >> ~/.zshrc
  shardplan completion fish > ~/.config/fish/completions/shardplan.fish

\b
Exit codes: 0 printed, 2 the shell is another.
""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what a shell needs to complete commands and options."""
    cls = get_completion_class(shell)
    assert cls is not None, "click knows the shells of the choice"
    click.echo(cls(ctx.find_root().command, {}, "shardplan", "_SHARDPLAN_COMPLETE").source())
