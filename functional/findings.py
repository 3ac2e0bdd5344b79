"""What may hurt, read off a plan: split tensors that nothing joins, sums that count too often. No torch.

These are signs, found by names and by the order in which modules are registered. Whether parts meet is tried by
``plan_build`` with ``example_inputs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from ..specs.dtypes import human_bytes
from ..specs.fold import fold
from ..specs.report import Finding
from ..specs.source import Made
from ..specs.steps import AddBiasAfterSync, DispatchTokens, Sync, VocabParallel

if TYPE_CHECKING:
    from ..specs.mesh import MeshAxis
    from ..specs.param import ParamSpec
    from ..specs.plan import Plan

_Verdict = Literal["later", "earlier", "never"]


def find(plan: Plan) -> Iterator[Finding]:
    """Iterate over all findings of a plan."""
    yield from _unjoined(plan)
    yield from _whole_biases(plan)
    yield from _counted_twice(plan)
    yield from _made_whole(plan)
    if plan.target is None and plan.mesh.data > 1:
        cause = f"data={plan.mesh.data}, and without a target nothing averages gradients over it"
        has_experts = any(spec.on("expert") for spec in plan.tree.values()) and plan.mesh.expert > 1
        target = "torch" if has_experts else "deepspeed"
        others = ", all but those of experts, which the plan averages" if has_experts else ""
        yield Finding("warning", "", cause, f"Use target={target!r}, or average them yourself before each step{others}")


def _unjoined(plan: Plan) -> Iterator[Finding]:
    """Find tensors that are split, while nothing after them in their block brings the parts together again.

    The block is the repeated layer that holds the module (``layers.3``), else all that is outside such layers. Modules
    count as being called in the order in which they are registered; where that alone speaks against it, it is a warning.
    """
    first = plan.mesh.coordinate(0)
    joins = _Joins(plan)
    for spec in plan.tree.values():
        for mesh_axis in spec.mesh_axes(first) if spec.kind == "parameter" else ():
            verdicts = {module: joins.verdict(module, mesh_axis) for module in map(_module, spec.paths)}
            for module, verdict in verdicts.items():
                where = _block(module) or "the model"
                size = human_bytes(spec.local_bytes(first))
                cause = f"{spec.type} is split ({size} a rank), and no synchronisation follows in {where}"
                if verdict == "never":
                    yield Finding("error", spec.path, cause, _mend(spec, mesh_axis, module, joins.own_rows))
                elif verdict == "earlier":
                    sign = f"{cause}, going by the order in which modules are registered"
                    yield Finding("warning", spec.path, sign, "If they are called in another order, nothing is wrong")


class _Joins:
    """The synchronisations that may bring parts together, and where they stand."""

    def __init__(self, plan: Plan) -> None:
        self.own_rows = {step.module for step in plan.steps if isinstance(step, VocabParallel)}
        self._dispatched = {step.module for step in plan.steps if isinstance(step, DispatchTokens)}
        self._by_module: dict[str, list[Sync]] = {}
        self._by_block: dict[str, list[Sync]] = {}
        for step in plan.steps:
            if isinstance(step, Sync) and step.when in ("forward_pre", "forward_post"):
                self._by_module.setdefault(step.module, []).append(step)
                self._by_block.setdefault(_block(step.module), []).append(step)
        self._span = _spans(plan.tree.all_paths)
        self._split_rows = {
            _module(path) for spec in plan.tree.values() for path in spec.paths if any(s.axis == 0 for s in spec.shards)
        }

    def verdict(self, module: str, mesh_axis: MeshAxis) -> _Verdict:
        """Tell whether the parts of a module are joined after it, perhaps before it, or not at all."""
        if mesh_axis == "expert":
            return "later" if module in self._dispatched else "never"
        here = self._span[module][0]
        verdict: _Verdict = "never"
        around = [step for name in (*_prefixes(module), module) for step in self._by_module.get(name, [])]
        for step in (*around, *self._by_block.get(_block(module), [])):
            if step.mesh_axis != mesh_axis:
                continue
            start, last = self._span.get(step.module, (len(self._span), len(self._span)))
            if last >= here if step.when == "forward_post" else start > here:
                return "later"
            if step.module not in self._split_rows:  # else it joins the parts of its own module
                verdict = "earlier"
        return verdict


def _whole_biases(plan: Plan) -> Iterator[Finding]:
    """Find biases that every rank adds to its part of an output."""
    first = plan.mesh.coordinate(0)
    deferred = {step.module for step in plan.steps if isinstance(step, AddBiasAfterSync)}
    for spec in plan.tree.values():
        path = f"{spec.module}.bias" if spec.module else "bias"
        if not spec.path.endswith("weight") or path not in plan.tree or spec.module in deferred:
            continue
        bias = plan.tree[path]
        if not spec.mesh_axes(first) or bias.mesh_axes(first):
            continue
        num = plan.mesh.num(*spec.mesh_axes(first))
        cause = f"{bias.type} is whole beside {spec.type}: each of {num} ranks adds it, and a sum counts it {num} times"
        fix = f"sch.at[{spec.module!r}].rowwise() adds it once, on a plain nn.Linear; or split it: .shard('bias', axis=0)"
        yield Finding("error", bias.path, cause, fix)


def _counted_twice(plan: Plan) -> Iterator[Finding]:
    """Find sums over ranks whose modules hold the same tensors: each would be counted as many times as there are ranks."""
    first = plan.mesh.coordinate(0)
    holders = {prefix for path in plan.tree.all_paths for prefix in _prefixes(path)}
    split = {
        (mesh_axis, prefix)
        for spec in plan.tree.values()
        for mesh_axis in spec.mesh_axes(first)
        for path in spec.paths
        for prefix in _prefixes(path)
    }
    for step in plan.steps:
        match step:
            case Sync(when="forward_post", op="all_reduce" | "reduce_scatter"):
                what = "output"
            case Sync(when="backward_post", op="all_reduce" | "reduce_scatter") | Sync(when="forward_pre", op="all_gather"):
                what = "input's gradient"
            case _:
                continue
        if step.module in holders and (step.mesh_axis, step.module) not in split:
            num = plan.mesh.num(step.mesh_axis)
            cause = f"{step} sums its {what} over {num} ranks that hold the same tensors, so that it counts {num} times"
            yield Finding("warning", step.module, cause, "Split its tensors, or synchronise the module before it")


def _made_whole(plan: Plan) -> Iterator[Finding]:
    """Find tensors that no init program stands for, so that one rank makes them whole and sends them."""
    if plan.mesh.num_ranks == 1:
        return
    rows = [
        (spec.path, (spec.type, human_bytes(spec.num_bytes), str(spec.source), spec.source.cause))
        for spec in plan.tree.values()
        if isinstance(spec.source, Made)
    ]
    for path, (type_, size, code, why) in fold(rows):
        cause = f"{type_} is made whole ({size}) on one rank by {code}, and sent: {why}"
        yield Finding("warning", path, cause, "Code that is pointwise would run on every rank for its own part")


def _mend(spec: ParamSpec, mesh_axis: MeshAxis, module: str, own_rows: set[str]) -> str:
    if mesh_axis == "expert":
        return f"sch.at[{module!r}].expert_parallel(), which splits the experts and sends them the tokens"
    shard = spec.on(mesh_axis)
    assert shard is not None, "it is split over this mesh axis"
    meant = "; if the split output is meant, .sync('forward_post', function) with a function that returns its tensor"
    over = "" if mesh_axis == "tensor" else f", mesh_axis={mesh_axis!r}"
    if shard.axis == 1 or module in own_rows:
        return f"sch.at[{module!r}].sync('forward_post', 'all_reduce'{over})"
    return f"sch.at[{module!r}].sync('forward_post', 'all_gather', axis=-1{over}), or .rowwise() on what follows{meant}"


def _module(path: str) -> str:
    return path.rpartition(".")[0]


def _block(module: str) -> str:
    names = module.split(".")
    numbered = [at for at, name in enumerate(names) if name.isdigit() and at < len(names) - 1]
    return ".".join(names[: numbered[-1] + 1]) if numbered else ""


def _prefixes(path: str) -> Iterator[str]:
    """Iterate over the modules around a tensor, the model itself (``""``) among them."""
    names = path.split(".")
    return (".".join(names[:depth]) for depth in range(len(names)))


def _spans(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the places of the first and the last tensor in every module."""
    spans: dict[str, tuple[int, int]] = {}
    for place, path in enumerate(paths):
        for module in _prefixes(path):
            spans[module] = (spans.get(module, (place, place))[0], place)
    return spans
