"""The audit: what each rank will hold, send and risk, read off the steps that will run. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..specs.dtypes import human_bytes
from ..specs.mesh import Coordinate
from ..specs.plan import Plan
from ..specs.report import Finding, Report, Share, Traffic
from ..specs.steps import Sync, VocabParallel
from .dry import DryEffects
from .interpret import interpret

if TYPE_CHECKING:
    from ..specs.param import ParamSpec
    from ..specs.receipt import Receipt


def audit(plan: Plan) -> Report:
    """Return what a plan means for each rank, without running it: no device, no process group, no torch.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> report = audit(Plan(Mesh(), SpecTree([ParamSpec("weight", (4, 4), "float32")]), steps=()))
    >>> report.ok, report.shares[0].parameter_bytes
    (True, 64)
    """
    if not isinstance(plan, Plan):
        msg = f"audit takes a plan, not a {type(plan).__name__}: audit(plan_build(schedule))"
        raise TypeError(msg)
    mesh = plan.mesh
    distinct = {
        (stage, data, tensor): predict(plan, mesh.rank(Coordinate(pipe=stage, data=data, tensor=tensor, mesh=mesh)))
        for stage in range(mesh.pipe)
        for data in range(min(mesh.data, 2))
        for tensor in range(min(mesh.tensor, 2))
    }  # places past the second are like it: parts are equal, and only the first sends
    return Report(
        title=f"audit of plan {plan.fingerprint[:12]}, {mesh}, target={plan.target or 'none'}",
        mesh=mesh,
        shares=tuple(_share(plan, stage, tensor, distinct) for stage in range(mesh.pipe) for tensor in range(mesh.tensor)),
        traffic=tuple(row for stage in range(mesh.pipe) for row in _traffic(stage, distinct[stage, 0, 0])),
        replicated=_replicated(plan),
        findings=(*_unsynchronised(plan), *_counted_twice(plan), *_unaveraged(plan)),
    )


def predict(plan: Plan, rank: int) -> Receipt:
    """Return the receipt that a rank will give, by running the interpreter with effects that only keep the books.

    >>> from shardplan.specs import Mesh, ParamSpec, Plan, SpecTree
    >>> from shardplan.specs.steps import Allocate, Place
    >>> tree = SpecTree([ParamSpec("weight", (4, 4), "float32")])
    >>> predict(Plan(Mesh(data=64), tree, [Allocate(0, ("weight",)), Place(0, ("weight",))]), rank=17).held_bytes
    64
    """
    effects = DryEffects(rank)
    interpret(plan, plan.mesh.coordinate(rank), effects)
    return effects.ledger.receipt(rank)


def _share(plan: Plan, stage: int, tensor: int, distinct: dict[tuple[int, int, int], Receipt]) -> Share:
    here = Coordinate(pipe=stage, data=0, tensor=tensor, mesh=plan.mesh)
    mine = [spec for spec in plan.tree.values() if stage in (spec.stage, *spec.also_on)]
    return Share(
        stage=stage,
        tensor=tensor,
        parameter_bytes=sum(spec.local_bytes(here) for spec in mine if spec.kind == "parameter"),
        buffer_bytes=sum(spec.local_bytes(here) for spec in mine if spec.kind != "parameter"),
        replicated_bytes=sum(spec.num_bytes for spec in mine if not spec.mesh_axes(here)),
        peak_bytes=max(receipt.peak_bytes for (s, _, t), receipt in distinct.items() if (s, t) == (stage, min(tensor, 1))),
    )


def _traffic(stage: int, receipt: Receipt) -> Iterator[Traffic]:
    kinds = dict.fromkeys((call.op, call.mesh_axes) for call in receipt.collectives)
    for op, mesh_axes in kinds:
        sizes = [call.num_bytes for call in receipt.collectives if (call.op, call.mesh_axes) == (op, mesh_axes)]
        yield Traffic(stage, op, mesh_axes, len(sizes), sum(sizes))


def _replicated(plan: Plan) -> tuple[tuple[str, str, int], ...]:
    if plan.mesh.tensor == 1:
        return ()
    first = plan.mesh.coordinate(0)
    whole = [spec for spec in plan.tree.values() if not spec.mesh_axes(first)]
    return tuple((s.path, s.type, s.num_bytes) for s in sorted(whole, key=lambda s: -s.num_bytes))


def _unaveraged(plan: Plan) -> Iterator[Finding]:
    if plan.target is None and plan.mesh.data > 1:
        cause = f"data={plan.mesh.data}, and without a target nothing averages gradients over it"
        yield Finding("warning", "", cause, "Use target='deepspeed', or average them yourself before each step")


def _unsynchronised(plan: Plan) -> Iterator[Finding]:
    """Find tensors that are split, while nothing after them in their block brings the parts together again.

    The block is the repeated layer that holds the module (``layers.3``), else the module around it. Modules count as
    being called in the order in which they are registered.
    """
    span = _spans(plan.tree.all_paths)
    after = [s for s in plan.steps if isinstance(s, Sync) and s.when != "backward_post" and s.module in span]
    joined = {s.module: span[s.module][1] for s in after if s.when == "forward_post"}
    entered = {s.module: span[s.module][0] for s in after if s.when == "forward_pre"}
    own_rows = {s.module for s in plan.steps if isinstance(s, VocabParallel)}
    first = plan.mesh.coordinate(0)
    for spec in plan.tree.values():
        if spec.kind != "parameter" or "tensor" not in spec.mesh_axes(first):
            continue
        modules = [path.rpartition(".")[0] for path in spec.paths]
        if not any(_joins_later(module, joined, entered, span) for module in modules):
            size = human_bytes(spec.local_bytes(first))
            block = _block(spec.module) or "the model"
            cause = f"{spec.type} is split ({size} a rank), and no synchronisation follows in {block}"
            yield Finding("error", spec.path, cause, _mend(spec, own_rows))


def _counted_twice(plan: Plan) -> Iterator[Finding]:
    """Find sums over ranks whose modules hold the same tensors: each would be counted as many times as there are ranks."""
    first = plan.mesh.coordinate(0)
    split = {
        prefix for spec in plan.tree.values() for path in spec.paths for prefix in _prefixes(path) if spec.mesh_axes(first)
    }
    holding = {prefix for path in plan.tree.all_paths for prefix in _prefixes(path)}
    for step in plan.steps:
        match step:
            case Sync(when="forward_post", op="all_reduce" | "reduce_scatter"):
                what = "output"
            case Sync(when="backward_post", op="all_reduce" | "reduce_scatter") | Sync(when="forward_pre", op="all_gather"):
                what = "input's gradient"
            case _:
                continue
        if step.module in holding - split:
            num = plan.mesh.num(step.mesh_axis)
            cause = f"{step} sums its {what} over {num} ranks that hold the same tensors, so that it counts {num} times"
            yield Finding("warning", step.module, cause, "Split its tensors, or synchronise the module before it")


def _prefixes(path: str) -> Iterator[str]:
    """Iterate over the modules around a tensor, the model itself (``""``) among them."""
    names = path.split(".")
    return (".".join(names[:depth]) for depth in range(len(names)))


def _joins_later(module: str, joined: dict[str, int], entered: dict[str, int], span: dict[str, tuple[int, int]]) -> bool:
    block, here = _block(module), span[module][0]
    prefix = f"{block}." if block else ""
    return any(last >= here for path, last in joined.items() if path == block or path.startswith(prefix)) or any(
        start > here for path, start in entered.items() if path.startswith(prefix)
    )


def _mend(spec: ParamSpec, own_rows: set[str]) -> str:
    module = spec.module
    meant = "; if the split output is meant, .sync('forward_post', function) with a function that returns its tensor"
    if spec.shards[0].axis == 1 or module in own_rows:
        return f"sch.at[{module!r}].sync('forward_post', 'all_reduce')"
    return f"sch.at[{module!r}].sync('forward_post', 'all_gather', axis=-1), or .rowwise() on what follows{meant}"


def _block(module: str) -> str:
    names = module.split(".")
    numbered = [at for at, name in enumerate(names) if name.isdigit() and at < len(names) - 1]
    return ".".join(names[: numbered[-1] + 1]) if numbered else ".".join(names[:-1])


def _spans(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the places of the first and the last tensor in every module."""
    spans: dict[str, tuple[int, int]] = {}
    for place, path in enumerate(paths):
        for module in _prefixes(path):
            spans[module] = (spans.get(module, (place, place))[0], place)
    return spans
