"""Count the structure of the packages: rooms, floors, circles, files, lines, and words that point at nothing.

    python benchmarks/house.py

A *room* is a package with all that is below it, or a loose file at the top of ``functional``. An *arrow* leads from a
room to a room that it imports; imports within functions and for type checkers count. A room's *floor* is one more than the
highest floor of the rooms that it imports. A *circle* is a set of rooms, or of files, that reach each other. To count
another checkout, put its packages before this one's on ``PYTHONPATH``.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import grimp
import networkx as nx

from shardplan import functional, specs

PACKAGES = ("shardplan.functional", "shardplan.specs")
RIDDLES = re.compile(r"\b(what|whatever|one|ones|those|others|of which|that of)\b", re.IGNORECASE)
"""Words on which sentences lean that a reader cannot follow, unless a noun stands by them."""
SHORT, LONG = 60, 400


def room_of(module: str) -> str:
    """Return the room of a module.

    >>> room_of("shardplan.functional.plan"), room_of("shardplan.functional.init.recorder"), room_of("shardplan.specs.mesh")
    ('plan', 'init', 'specs')
    """
    parts = module.removeprefix("shardplan.").split(".")
    if parts[0] == "specs":
        return "specs"
    if len(parts) == 1:
        return "functional"
    return parts[1]


def imports() -> nx.DiGraph[str]:
    """Return the graph of files, with an arrow from each to every file that it imports."""
    built = grimp.build_graph(*PACKAGES, cache_dir=None)
    files: nx.DiGraph[str] = nx.DiGraph()
    files.add_nodes_from(built.modules)
    for module in built.modules:
        files.add_edges_from((module, found) for found in built.find_modules_directly_imported_by(module))
    return files


def circles(graph: nx.DiGraph[str]) -> list[list[str]]:
    """Return the sets of nodes that reach each other."""
    return sorted(sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1)


def num_floors(rooms: nx.DiGraph[str]) -> int:
    """Return the number of rooms on the longest way down, circles counted as one room."""
    return nx.dag_longest_path_length(nx.condensation(rooms)) + 1


def sources() -> list[Path]:
    """Return all Python files of the packages."""
    roots = [Path(str(package.__file__)).parent for package in (functional, specs)]
    return sorted(path for root in roots for path in root.rglob("*.py"))


def prose(text: str) -> Iterator[str]:
    """Iterate over the docstrings and comments of a file, without examples."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for item in body if isinstance(body, list) else ():
            if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str):
                yield re.sub(r">>>.*", "", item.value.value)
    yield from (t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT)


def main() -> None:
    """Print the figures."""
    files = imports()
    rooms = nx.DiGraph(
        (room_of(a), room_of(b)) for a, b in files.edges if room_of(a) != room_of(b) and room_of(a) != "functional"
    )
    texts = [path.read_text() for path in sources()]
    lines = sorted(len(text.splitlines()) for text in texts)
    rows = {
        "rooms": len({room_of(module) for module in files}),
        "loose files at the top of functional": len(list(Path(str(functional.__file__)).parent.glob("*.py"))),
        "floors": num_floors(rooms),
        "arrows between rooms": rooms.number_of_edges(),
        "circles of rooms": len(circles(rooms)),
        "circles of files": len(circles(files)),
        "files": len(lines),
        "lines": sum(lines),
        "lines of a file: median": int(median(lines)),
        "lines of a file: longest": lines[-1],
        f"files under {SHORT} lines": sum(n < SHORT for n in lines),
        f"files over {LONG} lines": sum(n > LONG for n in lines),
        "words that point at nothing": sum(len(RIDDLES.findall(said)) for text in texts for said in prose(text)),
    }
    for name, figure in rows.items():
        print(f"{name:40}{figure:7}")
    for found in (*circles(rooms), *circles(files)):
        print("circle:", ", ".join(found))


if __name__ == "__main__":
    main()
