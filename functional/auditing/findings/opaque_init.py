"""Init code that runs whole on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from ....specs.source import Made

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan


def made_whole(plan: Plan) -> Iterator[Finding]:
    """Find tensors that no init program stands for, so that one rank makes them whole and sends them."""
    for spec in plan.tree.values() if plan.mesh.num_ranks > 1 else ():
        if isinstance(spec.source, Made):
            cause = (
                f"{spec.type} is made whole ({human_bytes(spec.num_bytes)}) on one rank by {spec.source}, and sent:"
                f" {spec.source.cause}"
            )
            yield Finding(
                "SP020", "warning", spec.path, cause, "Code that is pointwise would run on every rank for its own part"
            )
