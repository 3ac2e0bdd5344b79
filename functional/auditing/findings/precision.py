"""Parameters of full precision in a model of half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes, num_bytes, short_name
from ....specs.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.plan import Plan
    from ...dialects import Dialect

HALF_SHARE = 0.5
"""Share of the elements of floating-point parameters from which a 16-bit dtype is the dtype that the model computes in."""


def full_precision(plan: Plan, dialect: Dialect) -> Iterator[Finding]:
    """Find float32 and float64 parameters where most elements are bfloat16 or float16; buffers may have any dtype.

    Of any size: a small parameter costs few bytes, but its products are float32, and so are all later activations.
    """
    if dialect.training(plan).cast_to is not None:
        return
    floating = [s for s in plan.tree.values() if s.kind == "parameter" and s.dtype.startswith(("float", "bfloat"))]
    elements: dict[str, int] = {}
    for spec in floating:
        elements[spec.dtype] = elements.get(spec.dtype, 0) + spec.num_elements
    half = max(("bfloat16", "float16"), key=lambda dtype: elements.get(dtype, 0))
    if elements.get(half, 0) < HALF_SHARE * max(1, sum(elements.values())):
        return
    for spec in floating:
        if spec.dtype in ("float32", "float64"):
            here = plan.mesh.at(pipe=spec.places(plan.mesh)[0])
            local = spec.local_bytes(here)
            more = human_bytes(local - local * num_bytes(half) // num_bytes(spec.dtype))
            cause = (
                f"{spec.type} stands where most of the model is {short_name(half)}: {more} more on a rank, and activations"
                f" that meet it become {short_name(spec.dtype)}"
            )
            fix = f"model.get_parameter({spec.path!r}) to torch.{half} before the schedule, or .silence('SP025', reason=...)"
            yield Finding("SP025", "warning", spec.path, cause, fix)
