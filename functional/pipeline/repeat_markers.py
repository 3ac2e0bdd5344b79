"""Export repeated layers once, and copy their operations in the exported graph.

While the model is exported, the first layer of a family runs between two markers. Each layer that repeats it is a single
placeholder in the graph; after the export the operations between the markers are copied into its place.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import Factory, define, evolve, frozen
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from ..model.repeated_layers import LayerCall, RepeatedLayers, Representative
from .opaque_calls import LeafCall, OpaqueCall, is_opaque, stand_ins

if TYPE_CHECKING:
    from torch import fx

    from ...specs.tree import SpecTree


@torch.library.custom_op("shardplan::marker", mutates_args=())
def marker(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    """Mark where the operations of a representative begin or end; it never runs."""
    msg = "a marker of an export was run"
    raise AssertionError(msg)


@torch.library.custom_op("shardplan::repeat", mutates_args=())
def repeat(tensors: Sequence[Tensor], number: int) -> list[Tensor]:  # noqa: ARG001  its schema
    """Stand for a layer that repeats its representative; it never runs."""
    msg = "a placeholder of an export was run"
    raise AssertionError(msg)


_SHAPES: dict[int, Sequence[Tensor]] = {}
"""Tensors like the results of the placeholder that is being traced, by its number."""


marker.register_fake(lambda tensors, number: stand_ins(tensors))  # noqa: ARG005  its schema
repeat.register_fake(lambda tensors, number: stand_ins(_SHAPES[number]))  # noqa: ARG005  its schema


@define
class MarkedLayers(RepeatedLayers):
    """Repeated layers in an export.

    Args:
        repeated: For each placeholder, by number, the path of its layer and the representative.
        marks: Numbers of the markers where the operations of each representative begin and end.
        num_markers: Number of markers so far.
    """

    repeated: list[tuple[str, Representative]] = Factory(list)
    marks: dict[Representative, tuple[int, int]] = Factory(dict)
    num_markers: int = 0

    def first(self, call: LayerCall, leaves: list[Any], structure: TreeSpec) -> Any:
        """Run a layer that repeats none, between two markers."""
        begin, inside = self._mark(leaves)
        result, representative = self.run(call, *tree_unflatten(inside, structure))
        if representative is None:
            return result
        end, marked = self._mark(representative.returned)
        self.representatives.setdefault(call.key, []).append(representative)
        self.marks[representative] = begin, end
        return tree_unflatten(marked, representative.structure)

    def repeat(self, call: LayerCall, representative: Representative, leaves: list[Any], structure: TreeSpec) -> Any:  # noqa: ARG002  as declared
        """Put a placeholder in the place of a layer that repeats its representative."""
        number = len(self.repeated)
        self.repeated.append((call.path, representative))
        self.count(call.path, representative)
        _SHAPES[number] = [leaf for leaf in representative.returned if isinstance(leaf, Tensor)]
        try:
            outputs = repeat([leaf for leaf in leaves if isinstance(leaf, Tensor)], number)
        finally:
            del _SHAPES[number]
        return tree_unflatten(_with(representative.returned, outputs), representative.structure)

    def _mark(self, leaves: Sequence[Any]) -> tuple[int, list[Any]]:
        number, self.num_markers = self.num_markers, self.num_markers + 1
        return number, _with(leaves, marker([leaf for leaf in leaves if isinstance(leaf, Tensor)], number))


def _with(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return leaves with their tensors replaced, in order."""
    following = iter(tensors)
    return [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def write_out(graph: fx.Graph, layers: MarkedLayers, tree: SpecTree, calls: list[OpaqueCall]) -> bool:
    """Copy the operations of each representative into the place of its repeats, and remove the markers.

    Returns:
        Whether the graph has all placeholders; it does not reach into regions without gradients.
    """
    placeholders = {node.args[1]: node for node in graph.nodes if node.target is repeat._opoverload}  # noqa: SLF001  the operator
    markers = {node.args[1]: node for node in graph.nodes if node.target is marker._opoverload}  # noqa: SLF001  the operator
    if len(placeholders) < len(layers.repeated) or len(markers) < layers.num_markers:
        return False
    for number, (path, representative) in enumerate(layers.repeated):
        begin, end = (markers[mark] for mark in layers.marks[representative])
        _copy(graph, placeholders[number], begin, end, _Renaming(representative.path, path, tree), calls)
    for mark in markers.values():
        _replace(graph, mark, _listed(mark))
    return True


@frozen
class _Renaming:
    """Paths in a representative, mapped to the same paths in a repeat.

    Args:
        old: Path of the representative.
        new: Path of the repeat.
        tree: The model's tensors.
    """

    old: str
    new: str
    tree: SpecTree

    def module(self, path: str) -> str:
        """Return the path of a module in the repeat."""
        return self.new + path.removeprefix(self.old) if f"{path}.".startswith(f"{self.old}.") else path

    def tensor(self, path: str) -> str:
        """Return the path of a tensor in the repeat; a tie of the representative has several paths."""
        paths = (path, *self.tree[path].paths) if path in self.tree else ()
        return next((self.module(alias) for alias in paths if alias.startswith(f"{self.old}.")), path)


def _copy(
    graph: fx.Graph, placeholder: fx.Node, begin: fx.Node, end: fx.Node, renaming: _Renaming, calls: list[OpaqueCall]
) -> None:
    """Copy the operations between two markers into the place of a placeholder."""
    copies = {item: _listed(placeholder)[_number(item)] for item in begin.users}
    held: dict[str, fx.Node] = {}

    def in_repeat(node: fx.Node) -> fx.Node:
        if node.op != "get_attr" or (name := renaming.tensor(str(node.target))) == node.target:
            return copies.get(node, node)
        if name not in held:
            held[name] = graph.create_node("get_attr", name)
            held[name].meta = dict(node.meta)
        return held[name]

    node = begin.next
    with graph.inserting_before(placeholder):
        while node is not end:
            if node not in copies and node.op == "call_function" and node.target is not marker._opoverload:  # noqa: SLF001  the operator
                copied = graph.node_copy(node, in_repeat)
                copied.meta["nn_module_stack"] = {
                    key: (renaming.module(path), kind) for key, (path, kind) in node.meta.get("nn_module_stack", {}).items()
                }
                if is_opaque(node):
                    calls.append(_renamed(calls[_number(node)], renaming))
                    copied.args = (copied.args[0], len(calls) - 1)
                copies[node] = copied
            elif node.op == "call_function" and node not in copies:
                copies |= {item: in_repeat(_listed(node)[_number(item)]) for item in node.users}
            node = node.next
    _replace(graph, placeholder, [in_repeat(output) for output in _listed(end)])


def _renamed(call: OpaqueCall, renaming: _Renaming) -> OpaqueCall:
    return evolve(call, callee=LeafCall(renaming.module(call.callee.path))) if isinstance(call.callee, LeafCall) else call


def _replace(graph: fx.Graph, node: fx.Node, values: Sequence[fx.Node]) -> None:
    """Replace the results of a node by other values, and erase it."""
    for item in list(node.users):
        assert item.target is operator.getitem, "an operator's list is taken apart"
        item.replace_all_uses_with(values[_number(item)])
        graph.erase_node(item)
    graph.erase_node(node)


def _listed(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that are the first argument of a marker or placeholder."""
    listed: Any = node.args[0]
    return list(listed)


def _number(node: fx.Node) -> int:
    """Return the second argument of a node: the number of a placeholder, or the place of an item of its result."""
    number: Any = node.args[1]
    return number
