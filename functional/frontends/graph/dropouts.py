"""Random numbers of dropout: other numbers on each rank where it works on parts of activations, the same elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from ....specs.paths import module_of
from ....specs.verb_call import VerbCall
from .regions import Outcome, RefusedRegion, Region, is_in

if TYPE_CHECKING:
    from torch import fx

    from .propagate import GraphOperation, ModelAxes

_DROPOUTS = ("dropout", "dropout_", "native_dropout", "feature_dropout", "alpha_dropout")


def without_mixed_dropouts(found: ModelAxes, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes without regions in which a module drops parts of activations, and whole ones too.

    Random numbers are told apart by module, so that its ranks would draw either the same or different ones for both; unless
    one linear module adds up the parts between the two.
    """
    kept = list(outcomes)
    while mixed := [drops.module for drops in _all_drops(found, kept) if drops.kind == "mixed"]:
        path = mixed[0]
        own = [op for op in found.operations if op.module == path and _probability(op) > 0]
        reason = f"{path or 'the model'} drops entries of it and of whole activations, by random numbers of one kind"
        kept = [
            RefusedRegion(outcome.modules, reason)
            if isinstance(outcome, Region) and any(is_in(tensor.axes, outcome) for op in own for tensor in op.inputs)
            else outcome
            for outcome in kept
        ]
    return kept


def random_number_calls(found: ModelAxes, outcomes: Sequence[Outcome]) -> Iterator[VerbCall]:
    """Iterate over the calls of verbs with which modules that drop parts of activations draw other numbers on each rank."""
    by_module = {drops.module: drops for drops in _all_drops(found, outcomes)}
    for path, drops in sorted(by_module.items()):
        around = [outer for outer in by_module if outer != path and (path.startswith(f"{outer}.") or not outer)]
        is_split_around = bool(around) and by_module[max(around, key=len)].kind != "whole"
        is_split = drops.kind != "whole"
        if is_split != is_split_around:
            yield VerbCall(path, "fork_rng" if is_split else "share_rng")
        if drops.row:
            yield VerbCall(drops.row, "share_rng", (), (("onwards", True),))


@frozen
class _Drops:
    """The dropouts in a module's own code.

    Args:
        module: The module.
        kind: What they work on; first on parts, then on whole activations, or on both in any order.
        row: The linear module that adds up the parts, after which they work on whole activations.
    """

    module: str
    kind: Literal["parts", "whole", "parts, then whole", "mixed"]
    row: str = ""


def _all_drops(found: ModelAxes, outcomes: Sequence[Outcome]) -> Iterator[_Drops]:
    """Iterate over the modules whose own code drops entries."""
    regions = [outcome for outcome in outcomes if isinstance(outcome, Region)]
    events: dict[str, str] = {op.module: "" for op in found.operations if _probability(op) > 0}
    rows: dict[str, set[str]] = {path: set() for path in events}
    summing = {row for region in regions for row in region.rows}
    for op in found.operations:
        if _probability(op) > 0:
            is_split = any(is_in(tensor.axes, region) for tensor in op.inputs for region in regions)
            events[op.module] += "p" if is_split else "w"
        elif op.weight and op.module in summing and (around := module_of(op.module)) in events:
            events[around] += "r"
            rows[around].add(op.module)
    for path, order in events.items():
        kinds = set(order) - {"r"}
        if len(kinds) == 1:
            yield _Drops(path, "parts" if "p" in kinds else "whole")
        elif len(rows[path]) == 1 and re.fullmatch("(p+rw+)+", order):
            yield _Drops(path, "parts, then whole", next(iter(rows[path])))
        else:
            yield _Drops(path, "mixed")


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
