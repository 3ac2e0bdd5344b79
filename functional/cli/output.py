"""Print text, plain in a pipe and in colours on a terminal, or JSON on request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from ...specs.codec import as_plain
from ...specs.errors import PlanError, Problem
from ..saving.atomic import write_whole

_STYLES = {
    r"\S+@tensor\S*?(?=[,\]\s])": "cyan",
    r"\S+@data\S*?(?=[,\]\s])": "green",
    r"\S+@expert\S*?(?=[,\]\s])": "magenta",
    r"(?m)^SP\d{3} error": "bold red",
    r"(?m)^SP\d{3} warning": "bold yellow",
    r"(?m)^ok      yes, equal proven": "bold green",
    r"(?m)^ok      yes, but equal not followed": "bold yellow",
    r"(?m)^ok      no": "bold red",
    r"(?m)^.{8}\+ .*$": "green",
    r"(?m)^.{8}- .*$": "red",
    r"(?m)^stage \d+": "dim",
    r"(?m)^(holds|sends|step|crosses|whole|proofs|silenced|trusted|tensors|modules|finds|moves)  ": "bold",
}
"""Styles by pattern: split axes by mesh axis, findings, lines that a diff adds or removes, headings of tables."""


def write(file: Path, text: str) -> None:
    """Write a file.

    Raises:
        PlanError: If it cannot be written.
    """
    try:
        write_whole(file, text)
    except OSError as error:
        raise PlanError([Problem(str(file), f"it cannot be written: {error.strerror}", "Give another file")]) from None


def labelled(label: str, lines: Iterable[str]) -> Iterator[str]:
    """Iterate over lines, the first of them after a label."""
    for number, line in enumerate(lines):
        yield f"{label if not number else '':<10}{line}".rstrip()


def echo_json(record: Any) -> None:
    """Print a record, or plain values, as JSON."""
    click.echo(json.dumps(as_plain(record), indent=1))


def echo(text: str) -> None:
    """Print text: as it is in a pipe or with NO_COLOR, else in colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal or console.no_color:
        click.echo(text)
        return
    coloured = Text(text)
    for pattern, style in _STYLES.items():
        coloured.highlight_regex(pattern, style)
    console.print(coloured)
