"""What is sent over a boundary between stages, so that the least bytes cross: a minimum cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import networkx as nx

from .dataflow import is_sendable, is_size
from .symbolic_sizes import example_bytes

if TYPE_CHECKING:
    from torch import fx

    from .dataflow import Flow

_START, _END = "start", "end"


def crossing(flow: Flow, wanted: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the values that a stage is sent by the one before it: first those whose gradients come back, in order.

    A value that hangs on no parameter may be computed again instead, from what is sent of what it hangs on. With a node
    for each value, an edge of its bytes through it, and edges without limit from a value to those computed from it, the
    values to send are a minimum cut between what only earlier stages have and what is wanted (Ford and Fulkerson 1956).

    Args:
        flow: The graph.
        wanted: The values that it uses or passes on, and does not compute itself.

    Raises:
        networkx.NetworkXUnbounded: If something is wanted that is no tensor, and hangs on a parameter.
    """
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from([_START, _END])
    todo = list(dict.fromkeys(wanted))
    for node in todo:
        graph.add_edge((node, "out"), _END)
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_sendable(node):
            graph.add_edge((node, "in"), (node, "out"), capacity=example_bytes(node.meta["val"]))
        else:
            graph.add_edge((node, "in"), (node, "out"))
        if node in flow.fixed or node.op == "placeholder":
            graph.add_edge(_START, (node, "in"))
            continue
        for arg in node.all_input_nodes:
            if not flow.is_free(arg) and not is_size(arg):
                graph.add_edge((arg, "out"), (node, "in"))
                todo.append(arg)
    if not seen:
        return []
    _, (first, _) = nx.minimum_cut(graph, _START, _END)
    cut = [node for node in seen if (node, "in") in first and (node, "out") not in first]
    return sorted(cut, key=lambda node: (node not in flow.needs_gradient, flow.order[node]))
