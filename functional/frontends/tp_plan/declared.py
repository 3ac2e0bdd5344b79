"""The plan that a transformers model declares: its styles, and the modules and tensors that each rule names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from attrs import frozen

from ....specs.errors import Problem
from ....specs.verb_call import wildcard

if TYPE_CHECKING:
    from torch import nn

    from ....specs.param import ParamSpec
    from ...schedule import Schedule

_log = logging.getLogger(__name__)

COLWISE = ("colwise", "packed_colwise")
GATHERED = ("colwise_gather_output", "colwise_rep")
ROWWISE = ("rowwise", "packed_rowwise")
SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
SILENT = ("replicate", "local_params")
_OTHER_STYLES = (
    "embedding_rowwise",
    "embedding_colwise",
    "sequence_parallel",
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "all_reduce",
    "moe_tp_experts",
    "moe_identity_expert",
    "ep_dispatch_experts",
    "grouped_gemm",
)
STYLES = (*COLWISE, *GATHERED, *ROWWISE, *SPLIT_INPUT, *SILENT, *_OTHER_STYLES)
"""Every style that transformers 5.23 registers."""


@frozen
class DeclaredRule:
    """A rule of the plan, for a module or a tensor.

    Args:
        path: The module or tensor.
        style: The style's name.
        is_tensor: Whether it names a tensor, not a module.
    """

    path: str
    style: str
    is_tensor: bool


@frozen(eq=False)
class DeclaredPlan:
    """All rules of a plan for a model.

    Args:
        model: The model.
        sch: A schedule without declarations.
        rules: By path, modules first.
    """

    model: nn.Module
    sch: Schedule
    rules: Mapping[str, DeclaredRule]

    @property
    def num(self) -> int:
        """Ranks along ``tensor``."""
        return self.sch.mesh.tensor

    def below(self, path: str) -> Sequence[DeclaredRule]:
        """Return the rules for the submodules and tensors of a module, at any depth."""
        return self._below.get(path, [])

    def own(self, path: str) -> Sequence[ParamSpec]:
        """Return the tensors that a module holds itself."""
        return self._own.get(path, [])

    @cached_property
    def _below(self) -> dict[str, list[DeclaredRule]]:
        found: dict[str, list[DeclaredRule]] = {}
        for rule in self.rules.values():
            names = rule.path.split(".")
            for depth in range(len(names)):
                found.setdefault(".".join(names[:depth]), []).append(rule)
        return found

    @cached_property
    def _own(self) -> dict[str, list[ParamSpec]]:
        found: dict[str, list[ParamSpec]] = {}
        for spec in self.sch.tree.values():
            found.setdefault(spec.module, []).append(spec)
        return found

    def module(self, path: str) -> nn.Module:
        """Return the module at a path."""
        return self.model.get_submodule(path)


def read_plan(sch: Schedule, plan: Mapping[str, str]) -> DeclaredPlan:
    """Return the rules that a plan has for a model; rules that name nothing in it are written to the log."""
    model = sch.runtime.model
    plan = _from_the_top(sch, plan)
    used: set[str] = set()

    def style_of(paths: tuple[str, ...]) -> str | None:
        for path in paths:
            for key in (path, wildcard(path)):
                if key in plan:
                    used.add(key)
                    return plan[key]
        return None

    rules: dict[str, DeclaredRule] = {}
    for module in sch.modules:
        if style := style_of((module.path, *module.aliases)):
            rules[module.path] = DeclaredRule(module.path, style, is_tensor=False)
    for spec in sch.tree.values():
        if style := style_of(spec.paths):
            rules[spec.path] = DeclaredRule(spec.path, style, is_tensor=True)
    if unused := [f"{key}: {style}" for key, style in plan.items() if key not in used]:
        _log.warning("rules of its plan name nothing in this %s: %s", type(model).__name__, ", ".join(sorted(unused)))
    return DeclaredPlan(model, sch, rules)


def names_no_layer(sch: Schedule, plan: Mapping[str, str]) -> Problem | None:
    """Return a problem if no rule for repeated layers matches: the layers would stay whole without a word."""
    starred = [key for key in plan if "*" in key]
    if not starred or _fits(sch, _from_the_top(sch, plan)):
        return None
    cause = f"none of the {len(starred)} rules for layers in its plan, such as {starred[0]!r}, names anything in the model"
    return Problem("", cause, "Mend model._tp_plan: its keys are paths from the model on, with * for numbers")


def _from_the_top(sch: Schedule, plan: Mapping[str, str]) -> Mapping[str, str]:
    """Return a plan whose rules for layers begin at the model, where they began at a child of it."""
    if _fits(sch, plan):
        return plan
    prefixed = (
        {f"{child}.{key}" if "*" in key else key: style for key, style in plan.items()}
        for child, _ in sch.runtime.model.named_children()
    )
    found = [changed for changed in prefixed if _fits(sch, changed)]
    return found[0] if len(found) == 1 else plan


def _fits(sch: Schedule, plan: Mapping[str, str]) -> bool:
    """Tell whether any rule for layers names something."""
    paths = {wildcard(path) for m in sch.modules for path in (m.path, *m.aliases)} | set(map(wildcard, sch.tree.all_paths))
    return any("*" in key and key in paths for key in plan)
