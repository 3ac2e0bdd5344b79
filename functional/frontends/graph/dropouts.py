"""Random numbers of dropout: other numbers on each rank where it works on parts of activations, the same elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..verb_calls import VerbCall
from .regions import Outcome, RefusedRegion, Region, is_in

if TYPE_CHECKING:
    from torch import fx

    from .propagate import GraphOperation, ModelAxes

_DROPOUTS = ("dropout", "dropout_", "native_dropout", "feature_dropout", "alpha_dropout")


def without_mixed_dropouts(found: ModelAxes, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes without regions in which a module drops parts of activations, and whole ones too.

    Random numbers are told apart by module, so that its ranks would draw either the same or different ones for both.
    """
    kept = list(outcomes)
    while mixed := [path for path, on_parts in _by_module(found, kept).items() if len(set(on_parts)) > 1]:
        path = mixed[0]
        drops = [op for op in found.operations if op.module == path and _probability(op) > 0]
        reason = f"{path or 'the model'} drops entries of it and of whole activations, by random numbers of one kind"
        kept = [
            RefusedRegion(outcome.modules, reason)
            if isinstance(outcome, Region) and any(is_in(tensor.axes, outcome) for op in drops for tensor in op.inputs)
            else outcome
            for outcome in kept
        ]
    return kept


def random_number_calls(found: ModelAxes, outcomes: Sequence[Outcome]) -> Iterator[VerbCall]:
    """Iterate over the calls of verbs with which modules that drop parts of activations draw other numbers on each rank."""
    on_parts = {path: all(drops) for path, drops in _by_module(found, outcomes).items()}
    for path, is_split in sorted(on_parts.items()):
        around = [outer for outer in on_parts if outer != path and (path.startswith(f"{outer}.") or not outer)]
        is_split_around = bool(around) and on_parts[max(around, key=len)]
        if is_split != is_split_around:
            yield VerbCall(path, "fork_rng" if is_split else "share_rng")


def _by_module(found: ModelAxes, outcomes: Sequence[Outcome]) -> Mapping[str, list[bool]]:
    """Return, for each module whose own code drops entries, whether each dropout works on parts of activations."""
    regions = [outcome for outcome in outcomes if isinstance(outcome, Region)]
    drops: dict[str, list[bool]] = {}
    for op in found.operations:
        if _probability(op) > 0:
            is_split = any(is_in(tensor.axes, region) for tensor in op.inputs for region in regions)
            drops.setdefault(op.module, []).append(is_split)
    return drops


def _probability(op: GraphOperation) -> float:
    name = "dropout_p" if op.name == "scaled_dot_product_attention" else "p" if op.name in _DROPOUTS else ""
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
