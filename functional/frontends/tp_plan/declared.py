"""The plan that a transformers model declares, rule by rule: which modules and tensors each rule names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from attrs import frozen

from ..sayings import wildcard

if TYPE_CHECKING:
    from torch import nn

    from ....specs.param import ParamSpec
    from ...schedule import Schedule

_log = logging.getLogger(__name__)


@frozen
class Declared:
    """A rule of the plan, for one module or one tensor.

    Args:
        path: What it is about.
        style: The style's name.
        is_tensor: Whether it names a tensor, not a module.
    """

    path: str
    style: str
    is_tensor: bool


@frozen(eq=False)
class Declaration:
    """All rules of a plan, for one model.

    Args:
        model: The model.
        sch: A schedule that says nothing yet.
        rules: By path, modules first.
    """

    model: nn.Module
    sch: Schedule
    rules: Mapping[str, Declared]

    @property
    def num(self) -> int:
        """Ranks along ``tensor``."""
        return self.sch.mesh.tensor

    def below(self, path: str) -> Sequence[Declared]:
        """Return the rules for what is inside a module, or for its tensors."""
        return self._below.get(path, [])

    def own(self, path: str) -> Sequence[ParamSpec]:
        """Return the tensors that a module holds itself."""
        return self._own.get(path, [])

    @cached_property
    def _below(self) -> dict[str, list[Declared]]:
        found: dict[str, list[Declared]] = {}
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


def read_plan(sch: Schedule, plan: Mapping[str, str]) -> Declaration:
    """Return the rules that a plan has for a model; rules that name nothing in it are written to the log."""
    model = sch.runtime.model
    used: set[str] = set()

    def style_of(paths: tuple[str, ...]) -> str | None:
        for path in paths:
            for key in (path, wildcard(path)):
                if key in plan:
                    used.add(key)
                    return plan[key]
        return None

    rules: dict[str, Declared] = {}
    for module in sch.modules:
        if style := style_of((module.path, *module.aliases)):
            rules[module.path] = Declared(module.path, style, is_tensor=False)
    for spec in sch.tree.values():
        if style := style_of(spec.paths):
            rules[spec.path] = Declared(spec.path, style, is_tensor=True)
    if unused := [f"{key}: {style}" for key, style in plan.items() if key not in used]:
        _log.warning("rules of its plan name nothing in this %s: %s", type(model).__name__, ", ".join(sorted(unused)))
    return Declaration(model, sch, rules)
