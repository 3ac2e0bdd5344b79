"""Problems with the arguments of ``plan_build``, and with scripted modules in the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from ...specs.checkpoint import Checkpoint
from ...specs.errors import Problem
from ...specs.json_values import not_plain
from ...specs.program import InitProgram
from ...specs.source import Made, Unknown
from ..init.calls import wrong_signature
from .value_steps import Strategy

if TYPE_CHECKING:
    from torch import nn

    from ...specs.tree import SpecTree


def wrong_arguments(strategy: object, seed: object, init_weights: object, config: object) -> Iterator[Problem]:
    """Iterate over arguments of ``plan_build`` that have a wrong type or an unknown value."""
    strategies = ("auto", *get_args(Strategy))
    if strategy not in strategies:
        yield Problem("strategy", f"{strategy!r} is unknown", f"There are {', '.join(strategies)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        yield Problem("seed", f"it is an integer, not {seed!r}", "seed=0")
    if callable(init_weights):
        if wrong := wrong_signature(init_weights):
            cause = f"it is (module) or (module, path), not {wrong}"
            yield Problem("init_weights", cause, "Give the others by functools.partial")
    elif not isinstance(init_weights, (bool, Checkpoint)):
        is_path = isinstance(init_weights, (str, Path))
        fix = f'init_weights=Checkpoint("{init_weights}")' if is_path else "init_weights=True"
        cause = f"it is True, False, a Checkpoint or a function, not {init_weights!r}"
        yield Problem("init_weights", cause, fix)
    for path, value in not_plain("config", config):
        cause = f"a plan holds plain, finite JSON values with strings as keys, and this is {value!r}"
        yield Problem(path, cause, "Write its value")


def wrong_scripted(model: nn.Module, tree: SpecTree) -> Iterator[Problem]:
    """Iterate over tensors of scripted modules that are split, or have no values yet: their code cannot be changed."""
    scripted = [f"{path}." if path else "" for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    for spec in tree.values():
        if not any(path.startswith(prefix) for path in spec.paths for prefix in scripted):
            continue
        if spec.shards:
            cause = "it belongs to a scripted module, whose code cannot be split"
            yield Problem(spec.path, cause, "Leave it whole", spec.type)
        if isinstance(spec.source, (Unknown, Made, InitProgram)):
            cause = "it belongs to a scripted module, which keeps the values it came with"
            yield Problem(spec.path, cause, "Script the module on the CPU, with its values in place", spec.type)
