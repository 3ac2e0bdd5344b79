"""Dropout on split activations, whose random numbers differ from rank to rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .regions import is_in

if TYPE_CHECKING:
    from torch import fx

    from .propagate import Followed, Operation
    from .regions import Region

_DROPPING = ("dropout", "dropout_", "native_dropout", "feature_dropout", "alpha_dropout")


def forked(found: Followed, regions: Iterable[Region]) -> list[str]:
    """Return the modules that draw random numbers for split activations alone, outermost first."""
    split_here: dict[str, bool] = {}
    regions = list(regions)
    for op in found.operations:
        if _probability(op) > 0:
            is_split = any(is_in(held.axes, region) for held in op.inputs for region in regions)
            split_here[op.module] = split_here.get(op.module, True) and is_split
    chosen: list[str] = []
    for path, is_split in sorted(split_here.items()):
        inner = [other for other in split_here if other.startswith(f"{path}.")]
        above = any(path == outer or path.startswith(f"{outer}.") for outer in chosen)
        if is_split and not above and (not inner or all(split_here[other] for other in inner)):
            chosen.append(path)
    return chosen


def _probability(op: Operation) -> float:
    name = "dropout_p" if op.name == "scaled_dot_product_attention" else "p" if op.name in _DROPPING else ""
    values = dict(_arguments(op.node)) if name else {}
    if values.get("train") is False or values.get("training") is False:
        return 0.0
    value = values.get(name, 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _arguments(node: fx.Node) -> Iterator[tuple[str, object]]:
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    yield from zip(names, node.args, strict=False)
    yield from node.kwargs.items()
