"""Tied tensors: one that is split is split wherever it is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ....specs.errors import Problem
from ..verb_calls import VerbCall

if TYPE_CHECKING:
    from .declared import DeclaredPlan

_log = logging.getLogger(__name__)
_WHOLE = ("replicate", "local_params")


def with_ties(decl: DeclaredPlan, calls: Sequence[VerbCall | Problem]) -> list[VerbCall | Problem]:
    """Return the calls, with those that tied embeddings and heads need: both split the rows of one tensor, or neither."""
    split = {said.path: said for said in calls if isinstance(said, VerbCall) and said.verb in ("colwise", "vocab_parallel")}
    dropped: set[str] = set()
    added: list[VerbCall | Problem] = []
    for spec in decl.sch.tree.values():
        users = [path.rpartition(".")[0] for path in spec.paths]
        call = next((split[path] for path in users if path in split), None)
        if call is None or len(users) == 1:
            continue
        kept_whole = [p for p in users if (rule := decl.rules.get(p)) and rule.style in _WHOLE]
        if kept_whole:
            _log.warning("%s stays whole, as the plan keeps %s whole, which is the same tensor", spec.path, kept_whole[0])
            dropped.update(users)
            continue
        options = tuple(option for option in call.options if option[0] != "gather_output")
        for path in (p for p in users if p not in split):
            module = decl.module(path)
            if isinstance(module, nn.Embedding):
                added.append(VerbCall(path, "vocab_parallel", (), options))
            elif isinstance(module, nn.Linear):
                added.append(VerbCall(path, "colwise", (), (("gather_output", True), *options)))
            else:
                cause = (
                    f"it is tied to {call.path}, which is split, and a {type(module).__name__} is not known to take a part"
                )
                added.append(Problem(path, cause, "Untie them, or split both with the verbs", spec.type))
    kept = [said for said in calls if not (isinstance(said, VerbCall) and said.path in dropped and said.path in split)]
    return [*kept, *added]
