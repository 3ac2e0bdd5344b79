"""Parts of split tensors that are never joined, and sums over ranks that count too often: SP010 to SP013.

SP010 goes by the blocks that modules are in, and is for plans without evidence: where parts meet, ``plan_build`` follows by
types with ``example_inputs``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from ....specs.layout_steps import AddBiasAfterSync, DispatchTokens, Sync, VocabParallel
from ....specs.paths import join, module_of
from ..module_tree import block_of, modules_around, spans_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.mesh import MeshAxis
    from ....specs.param import ParamSpec
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ...dialects import Dialect


def unjoined(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find split tensors whose parts nothing joins in their block, in a plan of which no activations were followed.

    The block is the repeated layer that holds the module (``layers.3``), else all that is outside such layers.
    """
    if plan.is_followed:
        return
    first = plan.mesh.coordinate(0)
    joins = _Joins(plan)
    for spec in plan.tree.values():
        for mesh_axis in spec.mesh_axes(first) if spec.kind == "parameter" else ():
            for module in dict.fromkeys(map(module_of, spec.paths)):
                if joins.may_join(module, mesh_axis):
                    continue
                where = block_of(module) or "the model"
                size = human_bytes(spec.local_bytes(first))
                cause = f"{spec.type} is split ({size} a rank), and no synchronisation follows in {where}"
                yield Finding("SP010", "error", spec.path, cause, _mend(spec, mesh_axis, module, joins.own_rows))


def whole_biases(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find whole biases beside split weights: every rank adds the bias, and a sum counts it repeatedly."""
    first = plan.mesh.coordinate(0)
    deferred = {step.module for step in plan.steps if isinstance(step, AddBiasAfterSync)}
    for spec in plan.tree.values():
        path = join(spec.module, "bias")
        if not spec.path.endswith("weight") or path not in plan.tree or spec.module in deferred:
            continue
        bias = plan.tree[path]
        if not spec.mesh_axes(first) or bias.mesh_axes(first):
            continue
        num = plan.mesh.num(*spec.mesh_axes(first))
        cause = f"{bias.type} is whole beside {spec.type}: each of {num} ranks adds it, and a sum counts it {num} times"
        fix = f"sch.at[{spec.module!r}].rowwise() adds it once, on a plain nn.Linear; or split it: .shard('bias', axis=0)"
        yield Finding("SP012", "error", bias.path, cause, fix)


def counted_twice(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find sums over ranks that hold the same tensors: the result is counted once a rank."""
    first = plan.mesh.coordinate(0)
    holders = {prefix for path in plan.tree.all_paths for prefix in modules_around(path)}
    split = {
        (mesh_axis, prefix)
        for spec in plan.tree.values()
        for mesh_axis in spec.mesh_axes(first)
        for path in spec.paths
        for prefix in modules_around(path)
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
            yield Finding("SP013", "warning", step.module, cause, "Split its tensors, or synchronise the module before it")


FINDINGS = {"SP010": unjoined, "SP012": whole_biases, "SP013": counted_twice}


class _Joins:
    """The synchronisations that may join parts, by module and block."""

    def __init__(self, plan: Plan) -> None:
        self.own_rows = {step.module for step in plan.steps if isinstance(step, VocabParallel)}
        self._dispatched = {step.module for step in plan.steps if isinstance(step, DispatchTokens)}
        self._by_module: dict[str, list[Sync]] = {}
        self._by_block: dict[str, list[Sync]] = {}
        for step in plan.steps:
            if isinstance(step, Sync) and step.when in ("forward_pre", "forward_post"):
                self._by_module.setdefault(step.module, []).append(step)
                self._by_block.setdefault(block_of(step.module), []).append(step)
        self._span = spans_of(plan.tree.all_paths)
        self._split_rows = {
            module_of(path) for spec in plan.tree.values() for path in spec.paths if any(s.axis == 0 for s in spec.shards)
        }

    def may_join(self, module: str, mesh_axis: MeshAxis) -> bool:
        """Tell whether a synchronisation in the block of a module may join its parts."""
        if mesh_axis == "expert":
            return module in self._dispatched
        here = self._span[module][0]
        around = [step for name in (*modules_around(module), module) for step in self._by_module.get(name, [])]
        for step in (*around, *self._by_block.get(block_of(module), [])):
            if step.mesh_axis != mesh_axis:
                continue
            if step.module not in self._split_rows:  # else it joins the parts of its own module
                return True
            start, last = self._span.get(step.module, (len(self._span), len(self._span)))
            if last >= here if step.when == "forward_post" else start > here:
                return True
        return False


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
