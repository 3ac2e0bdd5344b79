"""Choose the values that are sent between stages, so that the fewest bytes are sent: a minimum cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import networkx as nx

from .dataflow import is_sendable, is_size
from .example_inputs import example_bytes

if TYPE_CHECKING:
    from torch import fx

    from .dataflow import DataFlow

_START, _END = "start", "end"


def values_to_send(flow: DataFlow, wanted: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the values that a stage receives from the stage before: first the values that need gradients, in graph order.

    A value that depends on no parameter may be computed again instead, from received values. With a node for each value, an
    edge of its bytes through it, and edges without limit to the values computed from it, the values to send are a minimum
    cut between the values that only earlier stages have and the wanted values (Ford and Fulkerson 1956).

    Args:
        flow: The graph.
        wanted: The values that the stage uses or passes on, and does not compute itself.

    Raises:
        networkx.NetworkXUnbounded: If a wanted value is no tensor, and depends on a parameter.
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
