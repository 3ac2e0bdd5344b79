"""Checks of the optimizer that a configuration for torch names, in a section like DeepSpeed's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....specs.errors import Problem
from ....specs.pattern import closest

_ADAM = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "fused",
)
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Adam": (*_ADAM, "decoupled_weight_decay"),
    "AdamW": _ADAM,
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "differentiable", "fused"),
}
"""The optimizers of ``torch.optim`` whose states are known, and their arguments besides the parameters (torch 2.13)."""

_EXAMPLE = '"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}'


def check_optimizer(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Iterate over the problems of the optimizer that a configuration names; there are none if it names no optimizer."""
    if "optimizer" not in config:
        return
    section = config["optimizer"]
    if not isinstance(section, Mapping):
        yield Problem("config.optimizer", f"it is a type and its params, not {section!r}", f"Write {_EXAMPLE}")
        return
    for name in sorted(set(section) - {"type", "params"}):
        yield Problem(f"config.optimizer.{name}", "it is not asked for", f"Write {_EXAMPLE}")
    kind, params = section.get("type"), section.get("params", {})
    if not isinstance(params, Mapping):
        cause = f"they are the optimizer's arguments by name, not {params!r}"
        yield Problem("config.optimizer.params", cause, f"Write {_EXAMPLE}")
    if kind not in ARGUMENTS:
        same = [name for name in ARGUMENTS if name.lower() == str(kind).lower()]
        near = same or closest(str(kind), ARGUMENTS)
        fix = f"There are {', '.join(ARGUMENTS)}" + (f"; the closest is {near[0]}" if near else "")
        cause = f"{kind!r} is none whose states are known"
        yield Problem("config.optimizer.type", cause, f"{fix}. Or leave it out: execute(plan, optimizer=...)")
        return
    for name in sorted(set(params) - set(ARGUMENTS[kind])) if isinstance(params, Mapping) else ():
        fix = f"There are {', '.join(ARGUMENTS[kind])}"
        yield Problem(f"config.optimizer.params.{name}", f"torch.optim.{kind} takes no {name}", fix)
