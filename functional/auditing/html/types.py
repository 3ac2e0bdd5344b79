"""The types of activations where modules begin and end, with one row for repeated layers, and what each module computes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ....specs.fold_layers import fold
from ....specs.listing import types_head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.equality import Equality
    from ....specs.plan import Plan


def types(plan: Plan) -> dict[str, Any] | None:
    """Return the rows; None if the plan has no evidence of its types."""
    if plan.equality is None:
        return None
    rows = (json.loads(cell) | {"path": path} for path, (cell,) in fold(_rows(plan.equality)))
    return {"head": types_head(plan.equality), "rows": list(rows)}


def _rows(evidence: Equality) -> Iterator[tuple[str, tuple[str]]]:
    calls: dict[str, list[list[str]]] = {}
    for call in evidence.calls:
        calls.setdefault(call.module, []).append([call.operator, str(call.result), call.line])
    for module in evidence.modules:
        row = {
            "inputs": [str(each) for each in module.inputs],
            "outputs": [str(each) for each in module.outputs],
            "calls": calls.get(module.path, []),
        }
        text = json.dumps(row)
        yield from ((path, (text,)) for path in (module.path, *evidence.repeats_of(module.path)))
