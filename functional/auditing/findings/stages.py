"""Pipeline stages that are much heavier than the mean, and boundaries that send more than hidden states: SP022, SP029."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.pipeline import Pipeline
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ...dialects import Dialect

OVER_MEAN = 1.2
"""Multiple of the mean from which the heaviest stage is reported: all stages wait for it a sixth of their time."""

OVER_BYTES = 64 * 2**20
"""Bytes above the mean from which the heaviest stage is reported: whole layers of small models differ by less."""

EXTRA_SHARE = 0.1
"""Share of the hidden states' bytes from which extra tensors are reported: scales and masks are smaller."""


def unbalanced(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find a stage with many more parameter bytes than the mean."""
    mesh = plan.mesh
    if mesh.pipe == 1:
        return
    sizes = [0] * mesh.pipe
    for spec in plan.tree.values():
        for place in spec.places(mesh) if spec.kind == "parameter" else ():
            sizes[place] += spec.local_bytes(mesh.at(pipe=place))
    mean, most = sum(sizes) / mesh.pipe, max(sizes)
    if most < OVER_MEAN * mean or most - mean < OVER_BYTES:
        return
    heaviest, lightest = sizes.index(most), sizes.index(min(sizes))
    peaks = [max(s.memory.peak_bytes for s in report.shares if s.coordinate.pipe == at) for at in (heaviest, lightest)]
    cause = (
        f"stage {heaviest} has {human_bytes(most)} of parameters on a rank, {most / mean:.2f} times the mean of"
        f" {human_bytes(mean)}; stage {lightest} has {human_bytes(sizes[lightest])}. They peak at"
        f" {human_bytes(peaks[0])} and {human_bytes(peaks[1])}"
    )
    num = max(mesh.pipe, len(plan.stages))
    fix = f"sch.cut_evenly({num}) gives the most even cuts by parameters, cut_evenly({num}, by='flops') by time"
    yield Finding("SP022", "warning", "", cause, fix)


def wide_boundaries(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find boundaries that send, besides the hidden states, tensors with a gradient or larger than the hidden states."""
    for number, stage in enumerate(plan.stages[:-1]):
        main = max(stage.outputs, key=lambda output: (output.requires_grad, output.num_bytes), default=None)
        if main is None:
            continue
        extra = [o for o in stage.outputs if o is not main and (o.requires_grad or o.num_bytes > main.num_bytes)]
        num_bytes = sum(output.num_bytes for output in extra)
        if not extra or num_bytes < EXTRA_SHARE * main.num_bytes:
            continue
        listed = ", ".join(f"{output} ({human_bytes(output.num_bytes)})" for output in extra)
        cause = (
            f"stage {number} gives {main} ({human_bytes(main.num_bytes)}), and besides {listed}: a micro-batch sends"
            f" {human_bytes(stage.output_bytes)} in {len(stage.outputs)} messages"
        )
        assert plan.pipeline is not None, "it has stages"
        fix = "Cut after a module that gives hidden states alone, such as a whole layer"
        yield Finding("SP029", "warning", _cut(plan.pipeline, number), cause, fix)


FINDINGS = {"SP022": unbalanced, "SP029": wide_boundaries}


def _cut(pipeline: Pipeline, number: int) -> str:
    """Return the module after which a stage ends."""
    if number < len(pipeline.cuts):
        return pipeline.cuts[number]
    return "".join(pipeline.chain[number][-1:]) if number < len(pipeline.chain) else ""
