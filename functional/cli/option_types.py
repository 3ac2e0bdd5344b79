"""Types of command-line options and arguments: a mesh, a size in bytes, ranks, a plan in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve, fields_dict

from ...specs.codec import loads
from ...specs.dtypes import parse_bytes
from ...specs.errors import PlanError, Problem
from ...specs.mesh import Mesh

if TYPE_CHECKING:
    from ...specs.plan import Plan


class MeshType(click.ParamType[Mesh]):
    """A mesh as ``pipe=2,data=4,tensor=8``.

    >>> MeshType().convert("pipe=2,data=4", None, None)
    Mesh(pipe=2, data=4, tensor=1, expert=1)
    """

    name = "axis=size,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mesh:
        """Return the mesh."""
        if isinstance(value, Mesh):
            return value
        sizes: dict[str, int] = {}
        for part in value.split(","):
            mesh_axis, _, size = (word.strip() for word in part.partition("="))
            if mesh_axis not in fields_dict(Mesh) or not size.isdecimal():
                self.fail(f"{part!r} is no mesh axis with a size; write pipe=2,data=4,tensor=8,expert=2", param, ctx)
            if mesh_axis in sizes:
                self.fail(f"mesh axis {mesh_axis!r} is given twice", param, ctx)
            sizes[mesh_axis] = int(size)
        try:
            return Mesh(**sizes)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class BytesType(click.ParamType[int]):
    """A size such as 80GiB or 80GB.

    >>> BytesType().convert("1.5TiB", None, None)
    1649267441664
    """

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        try:
            size = value if isinstance(value, int) else parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < 1:
            self.fail(f"{value!r} is no memory at all", param, ctx)
        return size


class RanksType(click.ParamType[range]):
    """A rank, or a range of ranks as ``16-23``.

    >>> RanksType().convert("16-23", None, None), RanksType().convert("5", None, None)
    (range(16, 24), range(5, 6))
    """

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        """Return the ranks."""
        if isinstance(value, range):
            return value
        first, dash, last = (word.strip() for word in value.partition("-"))
        if not first.isdecimal() or not (last.isdecimal() if dash else True) or int(last or first) < int(first):
            self.fail(f"{value!r} is no rank; write 17, or 16-23", param, ctx)
        return range(int(first), int(last or first) + 1)


MESH = MeshType()
RANKS = RanksType()
BYTES = BytesType()
FILE = click.Path(dir_okay=False, path_type=Path)


def load_plan(file: Path) -> Plan:
    """Read a plan from a file.

    Raises:
        PlanError: If the file cannot be read, or holds no plan of this version; the error names the file.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        cause = "there is no such file"
        raise PlanError([Problem(str(file), cause, f"Make it: shardplan plan ... -o {file}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            [Problem(str(file), f"it cannot be read: {error}", "Give a file that shardplan plan wrote")]
        ) from None
    try:
        return loads(text)
    except PlanError as error:
        named = [evolve(problem, path=str(file)) if problem.path == "plan" else problem for problem in error.problems]
        raise PlanError(named) from None
