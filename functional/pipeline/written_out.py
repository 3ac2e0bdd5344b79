"""The operations of the first of a family, written in the place of the others: after an export, on its graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from .opaque_calls import LeafCall, OpaqueCall, is_opaque
from .repeat_markers import marker, repeat

if TYPE_CHECKING:
    from torch import fx

    from ...specs.tree import SpecTree
    from .repeat_markers import Repeats


def write_out(graph: fx.Graph, repeats: Repeats, tree: SpecTree, calls: list[OpaqueCall]) -> bool:
    """Write the operations of the first of each family in the place of the others; remove the markers.

    Returns:
        Whether the graph had all placeholders: those in a region without gradients are out of reach.
    """
    found = {node.args[1]: node for node in graph.nodes if node.target is repeat._opoverload}  # noqa: SLF001  the operator
    ends = {node.args[1]: node for node in graph.nodes if node.target is marker._opoverload}  # noqa: SLF001  the operator
    if len(found) < len(repeats.repeated) or len(ends) < repeats.num_markers:
        return False
    for number, (path, first) in enumerate(repeats.repeated):
        begin, end = (ends[mark] for mark in repeats.marks[first])
        _write(graph, found[number], begin, end, _Names(first.path, path, tree), calls)
    for end in ends.values():
        _replace(graph, end, _listed(end))
    return True


@frozen
class _Names:
    """What belongs to the first of a family, and what to another one instead."""

    old: str
    new: str
    tree: SpecTree

    def path(self, path: str) -> str:
        """Return the path of a module of the other one."""
        return self.new + path.removeprefix(self.old) if f"{path}.".startswith(f"{self.old}.") else path

    def tensor(self, path: str) -> str:
        """Return the path of a tensor of the other one, where the first one's may have several."""
        paths = (path, *self.tree[path].paths) if path in self.tree else ()
        return next((self.path(other) for other in paths if other.startswith(f"{self.old}.")), path)


def _write(graph: fx.Graph, stand_in: fx.Node, begin: fx.Node, end: fx.Node, names: _Names, calls: list[OpaqueCall]) -> None:
    given = {item: _listed(stand_in)[_place(item)] for item in begin.users}
    held: dict[str, fx.Node] = {}

    def other(node: fx.Node) -> fx.Node:
        if node.op != "get_attr" or (name := names.tensor(str(node.target))) == node.target:
            return given.get(node, node)
        if name not in held:
            held[name] = graph.create_node("get_attr", name)
            held[name].meta = dict(node.meta)
        return held[name]

    node = begin.next
    with graph.inserting_before(stand_in):
        while node is not end:
            if node not in given and node.op == "call_function" and node.target is not marker._opoverload:  # noqa: SLF001  the operator
                copied = graph.node_copy(node, other)
                copied.meta["nn_module_stack"] = {
                    key: (names.path(path), kind) for key, (path, kind) in node.meta.get("nn_module_stack", {}).items()
                }
                if is_opaque(node):
                    calls.append(_renamed(calls[_place(node)], names))
                    copied.args = (copied.args[0], len(calls) - 1)
                given[node] = copied
            elif node.op == "call_function" and node not in given:
                given |= {item: other(_listed(node)[_place(item)]) for item in node.users}
            node = node.next
    _replace(graph, stand_in, [other(output) for output in _listed(end)])


def _renamed(call: OpaqueCall, names: _Names) -> OpaqueCall:
    return evolve(call, what=LeafCall(names.path(call.what.path))) if isinstance(call.what, LeafCall) else call


def _replace(graph: fx.Graph, node: fx.Node, values: Sequence[fx.Node]) -> None:
    """Put values in the place of what a node returned."""
    for item in list(node.users):
        assert item.target is operator.getitem, "an operator's list is taken apart"
        item.replace_all_uses_with(values[_place(item)])
        graph.erase_node(item)
    graph.erase_node(node)


def _listed(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a placeholder is given."""
    listed: Any = node.args[0]
    return list(listed)


def _place(node: fx.Node) -> int:
    """Return the number that a node has as its second argument: of a placeholder, or of an item of what it gave."""
    place: Any = node.args[1]
    return place
