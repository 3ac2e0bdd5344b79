"""Compare two plans: their fields, tensors, memory, messages and findings, and the bytes to move."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

from ..specs.distinct_ranks import Distinct
from ..specs.listing import layout_words, source_words
from ..specs.mesh import STAGE_AXES, factors
from ..specs.plan import Plan
from ..specs.plan_diff import Change, Messages, PlanDiff, RankChange, Spread, SpreadChange, TrafficChange
from .audit import audit
from .auditing.moved_bytes import moves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..specs.finding import Finding
    from ..specs.intervals import Interval
    from ..specs.param import ParamSpec
    from ..specs.report import Report

_SHORT = 12  # digits of a hash


def diff(before: Plan, after: Plan) -> PlanDiff:
    """Return the changes from one plan to another, and the bytes that each rank would have to receive.

    Memory, messages and findings come from the audits of both plans. Bytes to move are counted for parameters and saved
    buffers, between the shards that the rank of the same number holds before and after; optimizer states, which the runtime
    lays out, are not counted. Nothing is executed; time goes by tensors and kinds of ranks, not by ranks.

    Args:
        before: The plan before, planned or loaded.
        after: The plan after.

    Raises:
        TypeError: If an argument is not a plan.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, Shard, SpecTree
    >>> spec = ParamSpec("up.weight", (8, 4), "float32")
    >>> whole, split = (Plan(Mesh(tensor=4), SpecTree([s]), ()) for s in (spec, spec.shard(Shard(0))))
    >>> found = diff(split, whole)
    >>> [(change.path, change.before, change.after) for change in found.tensors]
    [('up.weight', 'f32[8@tensor, 4]', 'f32[8, 4]')]
    >>> found.moved_bytes, found.worst_bytes, diff(whole, whole).is_empty
    (384, 96, True)
    """
    for plan in (before, after):
        if not isinstance(plan, Plan):
            msg = f"diff takes two plans, not a {type(plan).__name__}: diff(loads(text), plan_build(schedule))"
            raise TypeError(msg)
    if before.fingerprint == after.fingerprint:
        return PlanDiff(before.fingerprint, after.fingerprint)
    one, other = audit(before), audit(after)
    found, worst_rank, worst_bytes = moves(before, after)
    tensors, modules = tuple(_tensors(before, after)), tuple(_modules(before, after))
    fields = list(_changes(_plan_fields(before, one), _plan_fields(after, other)))
    told = {"tree"} if tensors else set[str]()
    told |= {"steps"} if modules or any(None in (change.before, change.after) for change in tensors) else set()
    return PlanDiff(
        before=before.fingerprint,
        after=after.fingerprint,
        fields=(*fields, *_changed_digests(before, after, told | {change.path.partition(".")[0] for change in fields})),
        tensors=tensors,
        modules=modules,
        ranks=tuple(_ranks(one, other)),
        spreads=tuple(_spreads(one, other)),
        traffic=(*_traffic("execution", one, other), *_traffic("step", one, other)),
        came=tuple(_only(other.findings, one.findings)),
        went=tuple(_only(one.findings, other.findings)),
        moves=tuple(found),
        worst_rank=worst_rank,
        worst_bytes=worst_bytes,
    )


def _plan_fields(plan: Plan, report: Report) -> dict[str, str]:
    """Return the fields of the plan as a whole in words, by name, and whether it is proven equal to the whole model."""
    said = {"mesh": str(plan.mesh).removeprefix("mesh "), "target": plan.target or "none", "seed": str(plan.seed)}
    said |= {f"config{path}": text for path, text in _leaves("", plan.config)} if plan.config is not None else {}
    said |= {"random_scheme": str(plan.random_scheme)}
    said |= {"pipeline.cuts": ", ".join(plan.pipeline.cuts)} if plan.pipeline else {}
    said |= {f"silences.{silence.code} {silence.pattern}": silence.reason for silence in plan.silences}
    said |= {f"trusts.{trust.module}": str(trust) for trust in plan.trusts}
    said |= {"equal": report.proof("equal").answer}
    counts = Counter(type(step).__name__ for step in plan.steps)
    return said | {f"steps.{name}": str(num) for name, num in sorted(counts.items())}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(f"{path}.{name}", item)
    else:
        yield path, str(value)


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    for path in dict.fromkeys((*before, *after)):
        if before.get(path) != after.get(path):
            yield Change(path, "", before.get(path), after.get(path))


def _changed_digests(before: Plan, after: Plan, told: set[str]) -> Iterator[Change]:
    """Compare the fields for which no change is told yet, by the first digits of their hashes."""
    for name in dict.fromkeys((*before.canonical_fields, *after.canonical_fields)):
        text, other = before.canonical_fields.get(name, ""), after.canonical_fields.get(name, "")
        if name not in told and text != other:
            yield Change(name, "", _digest(text), _digest(other))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_SHORT]


def _tensors(before: Plan, after: Plan) -> Iterator[Change]:
    """Compare tensors by their canonical paths, in the order of the plan before; new tensors come last."""
    others = {spec.path: spec for spec in after.tree.values()}
    for old in before.tree.values():
        new = others.pop(old.path, None)
        if new is None:
            yield Change(old.path, "", old.type, None)
        elif old != new:
            one, other = _tensor_fields(old), _tensor_fields(new)
            found = [Change(old.path, what, one[what], other[what]) for what in one if one[what] != other[what]]
            found = [change for change in found if change.what != "split" or len(found) == 1]
            yield from found or [Change(old.path, "source", _digest(repr(old.source)), _digest(repr(new.source)))]
    yield from (Change(new.path, "", None, new.type) for new in others.values())


def _tensor_fields(spec: ParamSpec) -> dict[str, str]:
    """Return the fields of a tensor in the words of a listing."""
    return {
        "type": spec.type,
        "split": ", ".join(map(str, spec.shards)),  # where the type has no word for it
        "stage": ", ".join(map(str, (spec.stage, *spec.also_on))),
        "source": source_words(spec),
        "kind": spec.kind.replace("_", " "),
        "trained": "yes" if spec.requires_grad else "no",
        "ties": " = ".join(spec.paths) if spec.tie else "",
        "tags": ", ".join(f"{name}={value!r}" for name, value in spec.tags.items()),
    }


def _modules(before: Plan, after: Plan) -> Iterator[Change]:
    """Compare how modules compute; words that a module has before and after are left out."""
    one, other = layout_words(before.steps), layout_words(after.steps)
    for module in dict.fromkeys((*one, *other)):
        said, says = one.get(module, []), other.get(module, [])
        if said != says:
            gone, come = ("; ".join(w for w in some if w not in rest) for some, rest in ((said, says), (says, said)))
            if not gone and not come:
                gone, come = "; ".join(said), "; ".join(says)
            yield Change(module, "", gone if said else None, come if says else None)


def _ranks(before: Report, after: Report) -> Iterator[RankChange]:
    """Compare the memory of ranks where the meshes are the same, by kinds of ranks that are alike before and after."""
    if before.mesh != after.mesh:
        return
    joined = (_joined(before.distinct.runs(m), after.distinct.runs(m)) for m in factors(*STAGE_AXES))
    memories = [{share.coordinate: share.memory for share in report.shares} for report in (before, after)]
    for here, num_ranks in Distinct(before.mesh, *joined).places():
        one, other = memories[0][before.distinct.like(here)], memories[1][after.distinct.like(here)]
        if one != other:
            yield RankChange(here, num_ranks, one, other)


def _joined(one: Sequence[Interval], other: Sequence[Interval]) -> tuple[Interval, ...]:
    """Return runs of places, cut wherever a run of either list ends.

    >>> _joined([(0, 1), (1, 8)], [(0, 1), (1, 6), (6, 8)])
    ((0, 1), (1, 6), (6, 8))
    """
    return tuple(pairwise(sorted(set(chain.from_iterable((*one, *other))))))


def _spreads(before: Report, after: Report) -> Iterator[SpreadChange]:
    for what in ("held_bytes", "training_bytes", "peak_bytes"):
        one, other = _spread(before, what), _spread(after, what)
        if one != other:
            yield SpreadChange(what, one, other)


def _spread(report: Report, what: str) -> Spread:
    each = [getattr(share.memory, what) for share in report.shares]
    total = sum(size * share.num_ranks for size, share in zip(each, report.shares, strict=True))
    return Spread(max(each), min(each), total)


def _traffic(during: Literal["execution", "step"], before: Report, after: Report) -> Iterator[TrafficChange]:
    rows = _executing if during == "execution" else _training
    one, other = rows(before), rows(after)
    for stage, *kind in dict.fromkeys((*one, *other)):
        sent, sends = one.get((stage, *kind), Messages()), other.get((stage, *kind), Messages())
        if sent != sends:
            yield TrafficChange(during, stage, tuple(kind), sent, sends)


def _executing(report: Report) -> dict[tuple[Any, ...], Messages]:
    """Return the messages of execution by stage, mesh axes and operator, for the rank with the most bytes."""
    found: dict[tuple[Any, ...], Messages] = {}
    for row in report.execution:
        key = row.coordinate.pipe, " x ".join(row.mesh_axes) or "all ranks", row.op
        messages = Messages(row.num_calls, row.num_bytes)
        found[key] = max(found.get(key, messages), messages, key=lambda m: (m.num_bytes, m.num_calls))
    return found


def _training(report: Report) -> dict[tuple[Any, ...], Messages]:
    return {
        (row.stage, row.mesh_axis, row.cargo, row.op): Messages(row.num_calls, row.wire_bytes) for row in report.training
    }


def _only(findings: Sequence[Finding], others: Sequence[Finding]) -> Iterator[Finding]:
    """Iterate over the findings without a finding of the same code, severity and path among the others."""
    known = {(finding.code, finding.severity, finding.path) for finding in others}
    return (finding for finding in findings if (finding.code, finding.severity, finding.path) not in known)
