"""From the tensor-parallel plan that a transformers model declares (``model._tp_plan``) to a schedule of verbs.

The plan names a style for modules and tensors. Details that a style leaves to run-time objects of transformers are read
from the model here and written out: the bounds of heads, the blocks of fused tensors, the attributes that count heads, the
gradients that are partial. Nothing is done by the model's name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import evolve
from torch import nn

from ....specs.errors import Problem
from ....specs.paths import module_of
from ....specs.verb_call import VerbCall, wildcard
from ...schedule import Schedule, create_schedule
from ..verb_calls import apply_all
from .adapters import is_adapted, with_adapters, without_adapters
from .attention import norm_of_all_heads, split_attention
from .declared import COLWISE, ROWWISE, SILENT, STYLES, DeclaredPlan, DeclaredRule, names_no_layer, read_plan
from .heads import attention_above, forward_source
from .styles import calls_of_rule

if TYPE_CHECKING:
    from ....specs.mesh import Mesh

_log = logging.getLogger(__name__)


def schedule_from_tp_plan(model: nn.Module, mesh: Mesh) -> Schedule:
    """Return a schedule that splits a transformers model as its own tensor-parallel plan declares.

    Rules that name nothing in this model are written to the log. Styles that are unknown, and tensors and heads that
    cannot be split so, are problems of the schedule, which ``plan_build`` raises. Tensors that the plan does not name stay
    whole; ``plan_build(sch, example_inputs=...)`` finds tensors that would see a part of their gradient only.

    Args:
        model: A model with ``_tp_plan``, best built under ``torch.device("meta")``; adapters of peft may be on it.
        mesh: The ranks; with ``expert`` above 1 fused experts are also split by expert.
    """
    sch = create_schedule(model, mesh)
    if is_adapted(model):
        inner, bare = without_adapters(model)
        said = [call for said in _calls(create_schedule(bare, mesh)) for call in with_adapters(said, model, inner)]
    else:
        said = list(_calls(sch))
    calls = (call for call in said if isinstance(call, VerbCall))
    return _wrong(apply_all(sch, calls), [problem for problem in said if isinstance(problem, Problem)])


def _calls(sch: Schedule) -> Iterator[VerbCall | Problem]:
    """Iterate over the calls of verbs for a schedule without declarations."""
    model = sch.runtime.model
    plan = getattr(model, "_tp_plan", None)
    if not isinstance(plan, Mapping) or not plan:
        cause = f"this {type(model).__name__} declares no tensor-parallel plan"
        yield Problem("", cause, "Split it with the verbs, or set model._tp_plan")
    elif problem := names_no_layer(sch, plan):
        yield problem
    else:
        yield from _split_experts(sch, model)
        yield from _translate(read_plan(sch, plan)) if sch.mesh.tensor > 1 else ()


def _wrong(sch: Schedule, problems: list[Problem]) -> Schedule:
    return evolve(sch, problems=(*sch.problems, *dict.fromkeys(problems)))


def _translate(decl: DeclaredPlan) -> Iterator[VerbCall | Problem]:
    """Iterate over the calls of verbs for all rules of a plan: first for attention, then rule by rule."""
    if read := [
        rule.path for rule in decl.rules.values() if rule.style == "embedding_rowwise" and _is_read(decl, rule.path)
    ]:
        _log.warning("embeddings stay whole, as code of the model reads or replaces their rows: %s", ", ".join(read))
        decl = evolve(decl, rules={**decl.rules, **{p: DeclaredRule(p, "replicate", is_tensor=False) for p in read}})
    for rule in decl.rules.values():
        if rule.style not in STYLES:
            cause = f"the style {rule.style!r} is unknown"
            yield Problem(rule.path, cause, f"The styles of transformers are {', '.join(sorted(STYLES))}")
    attentions = dict.fromkeys(
        above
        for rule in decl.rules.values()
        if rule.style in (*COLWISE, *ROWWISE) and (above := attention_above(decl, rule.path)) is not None
    )
    if norms := dict.fromkeys(wildcard(norm) for path in attentions if (norm := norm_of_all_heads(decl, path))):
        _log.warning("heads are gathered after their projections, as norms work on all of them: %s", ", ".join(norms))
    done: set[str] = set()
    for path in attentions:
        said = list(split_attention(decl, path))
        if said:
            done.update((path, *(rule.path for rule in decl.below(path) if rule.style in (*COLWISE, *ROWWISE))))
        yield from said
    rest = (rule for rule in decl.rules.values() if rule.path not in done or rule.style not in (*COLWISE, *ROWWISE))
    yield from _with_ties(decl, [said for rule in rest for said in calls_of_rule(decl, rule, attentions)])


def _split_experts(sch: Schedule, model: nn.Module) -> Iterator[VerbCall | Problem]:
    """Return the split of fused experts by expert, where the mesh has an axis for it."""
    if sch.mesh.expert == 1:
        return
    decl = read_plan(sch, {**(getattr(model, "_tp_plan", None) or {}), **(getattr(model, "_ep_plan", None) or {})})
    styles = ("ep_dispatch_experts", "moe_tp_experts")
    found = [rule.path for rule in decl.rules.values() if rule.style in styles and not rule.is_tensor]
    if not found:
        cause = f"mesh axis 'expert' has {sch.mesh.expert}, and the plans of this model name no fused experts"
        yield Problem("", cause, "Leave expert=1")
    yield from (VerbCall(path, "expert_parallel") for path in found)


def _is_read(decl: DeclaredPlan, path: str) -> bool:
    """Tell whether code besides the lookup reads rows of an embedding, or it has tensors besides its weight."""
    names = path.split(".")
    if len(list(decl.module(path).parameters(recurse=False))) > 1:
        return True
    above = (decl.module(".".join(names[:depth])) for depth in range(len(names)))
    return any(re.search(rf"\b{names[-1]}\.weight\b", forward_source(type(module))) for module in above)


def _with_ties(decl: DeclaredPlan, calls: Sequence[VerbCall | Problem]) -> list[VerbCall | Problem]:
    """Return the calls so that tied embeddings and heads both split the rows of their tensor, or neither does."""
    split = {said.path: said for said in calls if isinstance(said, VerbCall) and said.verb in ("colwise", "vocab_parallel")}
    dropped: set[str] = set()
    added: list[VerbCall | Problem] = []
    for spec in decl.sch.tree.values():
        users = [module_of(path) for path in spec.paths]
        call = next((split[path] for path in users if path in split), None)
        if call is None or len(users) == 1:
            continue
        kept_whole = [p for p in users if (rule := decl.rules.get(p)) and rule.style in SILENT]
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
