"""From the tensor-parallel plan that a transformers model declares (``model._tp_plan``) to a schedule of verbs.

The plan names a style for modules and tensors. What a style leaves to run-time objects of transformers is read from the
model here and written out: where one head ends and the next begins, which blocks a fused tensor has, whose attributes
count heads, which gradients are parts. Nothing is done by the model's name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve
from torch import nn

from ....specs.errors import Problem
from ...schedule import Schedule, create_schedule
from ..verb_calls import Options, VerbCall, apply_all, wildcard
from .attention import norm_of_all_heads, split_attention
from .declared import DeclaredPlan, DeclaredRule, names_no_layer, read_plan
from .experts import split_fused, sum_experts
from .heads import attention_above, first_number, forward_source
from .ties import with_ties

if TYPE_CHECKING:
    from ....specs.mesh import Mesh

_log = logging.getLogger(__name__)

COLWISE = ("colwise", "packed_colwise")
GATHERED = ("colwise_gather_output", "colwise_rep")
ROWWISE = ("rowwise", "packed_rowwise")
SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
SILENT = ("replicate", "local_params")
_OTHERS = (
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
STYLES = (*COLWISE, *GATHERED, *ROWWISE, *SPLIT_INPUT, *SILENT, *_OTHERS)
"""Every style that transformers 5.23 registers."""


def schedule_from_tp_plan(model: nn.Module, mesh: Mesh) -> Schedule:
    """Return a schedule that splits a transformers model as its own tensor-parallel plan declares.

    Rules that name nothing in this model are written to the log. Styles that are unknown, and tensors and heads that
    cannot be split so, are problems of the schedule, which ``plan_build`` raises. Tensors that the plan does not name stay
    whole; ``plan_build(sch, example_inputs=...)`` finds those that would see a part of their gradient only.

    Args:
        model: A model with ``_tp_plan``, best built under ``torch.device("meta")``.
        mesh: The ranks; with ``expert`` above 1 fused experts are also split by expert.
    """
    sch = create_schedule(model, mesh)
    plan = getattr(model, "_tp_plan", None)
    if not isinstance(plan, Mapping) or not plan:
        cause = f"this {type(model).__name__} declares no tensor-parallel plan"
        return _wrong(sch, [Problem("", cause, "Split it with the verbs, or set model._tp_plan")])
    if problem := names_no_layer(sch, plan):
        return _wrong(sch, [problem])
    said = [*_split_experts(sch, model), *(_translate(read_plan(sch, plan)) if mesh.tensor > 1 else ())]
    calls = (call for call in said if isinstance(call, VerbCall))
    return _wrong(apply_all(sch, calls), [problem for problem in said if isinstance(problem, Problem)])


def _wrong(sch: Schedule, problems: list[Problem]) -> Schedule:
    return evolve(sch, problems=(*sch.problems, *dict.fromkeys(problems)))


def _translate(decl: DeclaredPlan) -> Iterator[VerbCall | Problem]:
    """Return what the rules of a plan say, first of attention, then one by one."""
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
    yield from with_ties(decl, [said for rule in rest for said in _one(decl, rule, attentions)])


def _one(decl: DeclaredPlan, rule: DeclaredRule, attentions: Mapping[str, None]) -> Iterator[VerbCall | Problem]:  # noqa: C901, PLR0912  one case a style
    """Return what one rule says, outside attention."""
    path = rule.path
    if rule.is_tensor:
        owner = decl.rules.get(path.rpartition(".")[0])
        if rule.style in (*COLWISE, *ROWWISE) and (owner is None or owner.style not in ("moe_tp_experts", "all_reduce")):
            yield from _bare(decl, rule)
        return
    match rule.style:
        case style if style in COLWISE:
            gathers = style == "colwise" and not _has_partner(decl, path, (*ROWWISE,))
            yield VerbCall(path, "colwise", (), (*_gathered(gathers), *_blocks(decl, path, style), *_uneven(decl, path, 0)))
            yield from () if gathers else _activation(decl, path.rpartition(".")[0])
        case style if style in GATHERED:
            yield VerbCall(path, "colwise", (), (*_gathered(gathers=True), *_uneven(decl, path, 0)))
        case style if style in ROWWISE:
            whole = not _has_partner(decl, path, COLWISE)
            yield VerbCall(path, "rowwise", (), (*_split_input(whole), *_uneven(decl, path, 1)))
        case style if style in SPLIT_INPUT:
            yield VerbCall(path, "rowwise", (), (*_split_input(whole=True), *_uneven(decl, path, 1)))
        case "embedding_rowwise":
            yield VerbCall(path, "vocab_parallel", (), _uneven(decl, path, 0))
            yield from _inside_embedding(decl, path)
        case "embedding_colwise":
            yield from _embedding_colwise(decl, path)
        case "sequence_parallel":
            yield VerbCall(path, "sync", ("backward_post", "all_gather", 1))
            yield VerbCall(path, "sync", ("forward_post", "all_gather", 1))
            yield VerbCall(path, "sum_gradient")
        case "replicated_with_grad_allreduce":
            above = attention_above(decl, path)
            is_gathered = above is not None and norm_of_all_heads(decl, above)
            if above is not None and path == _norm_of_rotary_part(decl, above):
                yield VerbCall(path, "sync", ("backward_pre", "all_reduce"))
            elif any(True for _ in decl.module(path).parameters()) and not is_gathered:
                yield VerbCall(path, "sum_gradient")
        case "mla_kv_a_proj":
            yield from _mla(decl, path, attentions)
        case "all_reduce":
            if any(below.is_tensor for below in decl.below(path)):
                yield from split_fused(decl, path)
                yield from sum_experts(decl, path)
            else:
                yield VerbCall(path, "sync", ("forward_post", "all_reduce"))
        case "moe_tp_experts":
            yield from split_fused(decl, path)
            yield from sum_experts(decl, path)
        case "moe_identity_expert":
            yield VerbCall(path, "sync", ("forward_pre", "divide"))
        case _:
            return


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


def _bare(decl: DeclaredPlan, rule: DeclaredRule) -> Iterator[VerbCall | Problem]:
    """Return the split of a tensor that a rule names itself, outside attention and experts."""
    spec = decl.sch.tree[rule.path]
    if rule.style.startswith("packed") and len(spec.orig_shape) < 2:  # noqa: PLR2004  a vector has one axis
        return
    axis = max(len(spec.orig_shape) - 2, 0) if rule.style in COLWISE else -1
    if rule.style in ROWWISE and len(spec.orig_shape) == 1:
        return  # the bias of a rowwise module: whole, added once
    size = spec.orig_shape[axis] if spec.orig_shape else 0
    if not spec.orig_shape or (rule.style.startswith("packed") and size % 2):
        cause = f"style {rule.style!r} cannot split it: " + ("it is a scalar" if not spec.orig_shape else "its axis is odd")
        yield Problem(rule.path, cause, "Split it with the verbs", spec.type)
        return
    blocks: Options = (("blocks", (size // 2, size // 2)),) if rule.style.startswith("packed") else ()
    part = size // 2 if blocks else size
    yield VerbCall(rule.path, "shard", (), (("axis", axis), *blocks, *((("uneven", True),) if part % decl.num else ())))


def _is_read(decl: DeclaredPlan, path: str) -> bool:
    """Tell whether rows of an embedding are read past their lookup: by code above it, or replaced by a tensor of its own."""
    names = path.split(".")
    if len(list(decl.module(path).parameters(recurse=False))) > 1:
        return True
    above = (decl.module(".".join(names[:depth])) for depth in range(len(names)))
    return any(re.search(rf"\b{names[-1]}\.weight\b", forward_source(type(module))) for module in above)


def _activation(decl: DeclaredPlan, path: str) -> Iterator[VerbCall]:
    """Return the sum of the gradients of what an activation function beside a split layer has learnt, such as a slope."""
    for name, child in decl.module(path).named_children():
        if name.startswith("act") and f"{path}.{name}" not in decl.rules:
            for inner, module in child.named_modules():
                own = list(module.parameters(recurse=False))
                if own and all(parameter.numel() == 1 for parameter in own):
                    yield VerbCall(f"{path}.{name}.{inner}".rstrip("."), "sum_gradient")


def _inside_embedding(decl: DeclaredPlan, path: str) -> Iterator[VerbCall | Problem]:
    """Return what a norm inside an embedding needs: it gives zeros for the zeros of others' rows, if it adds nothing."""
    for name, child in decl.module(path).named_modules():
        own = dict(child.named_parameters(recurse=False)) if name else {}
        if "bias" in own:
            cause = "its bias is added to the zeros that stand for other ranks' rows, and counted once a rank"
            yield Problem(f"{path}.{name}", cause, "Keep the embedding whole: style 'replicate'")
        elif own:
            yield VerbCall(f"{path}.{name}", "sum_gradient")


def _embedding_colwise(decl: DeclaredPlan, path: str) -> Iterator[VerbCall | Problem]:
    module = decl.module(path)
    if not isinstance(module, nn.Embedding):
        yield Problem(path, f"style 'embedding_colwise' is for nn.Embedding, and this is a {type(module).__name__}", "")
        return
    yield VerbCall(path, "shard", ("weight",), (("axis", 1),))
    yield VerbCall(path, "sync", ("forward_post", "all_gather", -1))
    yield VerbCall(path, "set", (), (("embedding_dim", module.embedding_dim // decl.num),))


def _mla(decl: DeclaredPlan, path: str, attentions: Mapping[str, None]) -> Iterator[VerbCall | Problem]:
    """Return the sum of the gradient of the rotary part, which goes past the split projections of MLA."""
    attention = attention_above(decl, path)
    if attention is None or attention not in attentions:
        return  # nothing there is split
    module, above = decl.module(path), decl.module(attention)
    rope = first_number((above, getattr(above, "config", None)), ("qk_rope_head_dim",))
    if not isinstance(module, nn.Linear) or rope is None:
        cause = "style 'mla_kv_a_proj' needs an nn.Linear, and qk_rope_head_dim on its attention or config"
        yield Problem(path, cause, 'Say it with the verb: .sync("backward_pre", "all_reduce", features=(start, stop))')
    elif rope and not _norm_of_rotary_part(decl, attention):
        features = (module.out_features - rope, module.out_features)
        yield VerbCall(path, "sync", ("backward_pre", "all_reduce"), (("features", features),))


def _norm_of_rotary_part(decl: DeclaredPlan, attention: str) -> str:
    """Return the path of a norm of MLA's rotary part, after which its gradient is summed, that of the norm with it."""
    rules = decl.below(attention)
    if not any(rule.style == "mla_kv_a_proj" for rule in rules):
        return ""
    norms = [rule.path for rule in rules if rule.style == "replicated_with_grad_allreduce" and "rope" in rule.path]
    return norms[0] if norms else ""


def _has_partner(decl: DeclaredPlan, path: str, styles: tuple[str, ...]) -> bool:
    """Tell whether the module that holds this one also holds one that is split the other way."""
    return any(rule.style in styles for rule in decl.below(path.rpartition(".")[0]))


def _blocks(decl: DeclaredPlan, path: str, style: str) -> Options:
    """Return gate|up where one linear layer makes both: said by its style, or by the width that its partner takes."""
    module = decl.module(path)
    size = getattr(module, "out_features", 0)
    parent = path.rpartition(".")[0]
    takes = {
        getattr(decl.module(rule.path), "in_features", 0)
        for rule in decl.below(parent)
        if rule.style in ROWWISE and not rule.is_tensor
    }
    fused = re.search(r"gate_?up|up_?gate", path.rpartition(".")[2]) is not None and size // 2 in takes
    return (("blocks", (size // 2, size - size // 2)),) if style == "packed_colwise" or fused else ()


def _uneven(decl: DeclaredPlan, path: str, axis: int) -> Options:
    """Return that parts may differ, where the ranks do not divide an axis of a module's weight."""
    weight = getattr(decl.module(path), "weight", None)
    if weight is None or weight.dim() <= axis or weight.shape[axis] % decl.num == 0:
        return ()
    return (("uneven", True),)


def _gathered(gathers: bool) -> Options:  # noqa: FBT001  its only argument
    return (("gather_output", True),) if gathers else ()


def _split_input(whole: bool) -> Options:  # noqa: FBT001  its only argument
    return (("split_input", True),) if whole else ()
