"""The styles of a plan's rules, each as calls of verbs: linear modules, embeddings, norms, experts, outside attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from ....specs.errors import Problem
from ....specs.paths import module_of, name_of
from ....specs.verb_call import Options, VerbCall
from .attention import norm_of_all_heads
from .declared import COLWISE, GATHERED, ROWWISE, SPLIT_INPUT
from .dropouts import dropouts_of_features
from .experts import split_fused, sum_experts
from .heads import attention_above, first_number, source_of

if TYPE_CHECKING:
    from .declared import DeclaredPlan, DeclaredRule


def calls_of_rule(decl: DeclaredPlan, rule: DeclaredRule, attentions: Mapping[str, None]) -> Iterator[VerbCall | Problem]:  # noqa: C901, PLR0912  a case for each style
    """Iterate over the calls of verbs for a rule, outside attention."""
    path = rule.path
    if rule.is_tensor:
        owner = decl.rules.get(module_of(path))
        if rule.style in (*COLWISE, *ROWWISE) and (owner is None or owner.style not in ("moe_tp_experts", "all_reduce")):
            yield from _bare(decl, rule)
        return
    match rule.style:
        case style if style in COLWISE:
            gathers = style == "colwise" and not _has_partner(decl, path, (*ROWWISE,))
            gathers |= _takes_statistics(decl, module_of(path))
            yield VerbCall(path, "colwise", (), (*_gathered(gathers), *_blocks(decl, path, style), *_uneven(decl, path, 0)))
            yield from () if gathers else _activation(decl, module_of(path))
        case style if style in GATHERED:
            yield VerbCall(path, "colwise", (), (*_gathered(gathers=True), *_uneven(decl, path, 0)))
        case style if style in ROWWISE:
            whole = not _has_partner(decl, path, COLWISE) or _takes_statistics(decl, module_of(path))
            yield VerbCall(path, "rowwise", (), (*_split_input(whole), *_uneven(decl, path, 1)))
            yield from () if whole else dropouts_of_features(decl, path)
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


def _bare(decl: DeclaredPlan, rule: DeclaredRule) -> Iterator[VerbCall | Problem]:
    """Split a tensor that a rule names itself, outside attention and experts."""
    spec = decl.sch.tree[rule.path]
    if rule.style.startswith("packed") and len(spec.orig_shape) < 2:  # noqa: PLR2004  a vector
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


def _activation(decl: DeclaredPlan, path: str) -> Iterator[VerbCall]:
    """Sum the gradients of parameters of an activation function beside a split layer, such as a slope."""
    for name, child in decl.module(path).named_children():
        if name.startswith("act") and f"{path}.{name}" not in decl.rules:
            for inner, module in child.named_modules():
                own = list(module.parameters(recurse=False))
                if own and all(parameter.numel() == 1 for parameter in own):
                    yield VerbCall(f"{path}.{name}.{inner}".rstrip("."), "sum_gradient")


def _inside_embedding(decl: DeclaredPlan, path: str) -> Iterator[VerbCall]:
    """Sum the gradients of a norm inside an embedding, which works on the rows that each rank has."""
    for name, child in decl.module(path).named_modules():
        if name and dict(child.named_parameters(recurse=False)):
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
    """Sum the gradient of the rotary part, which bypasses the split projections of MLA."""
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
    """Return the path of a norm of MLA's rotary part, if any; the gradient of its output is summed."""
    rules = decl.below(attention)
    if not any(rule.style == "mla_kv_a_proj" for rule in rules):
        return ""
    norms = [rule.path for rule in rules if rule.style == "replicated_with_grad_allreduce" and "rope" in rule.path]
    return norms[0] if norms else ""


def _has_partner(decl: DeclaredPlan, path: str, styles: tuple[str, ...]) -> bool:
    """Tell whether the module around this module also holds a module with one of the styles."""
    return any(rule.style in styles for rule in decl.below(module_of(path)))


def _takes_statistics(decl: DeclaredPlan, path: str) -> bool:
    """Tell whether a module's code takes a mean or a deviation, of features that it then needs all of."""
    return re.search(r"\b(mean|std|var)\(", source_of(type(decl.module(path)))) is not None


def _blocks(decl: DeclaredPlan, path: str, style: str) -> Options:
    """Return the blocks gate and up of a layer that makes both, as its style or the width of its partner tells."""
    module = decl.module(path)
    size = getattr(module, "out_features", 0)
    parent = module_of(path)
    takes = {
        getattr(decl.module(rule.path), "in_features", 0)
        for rule in decl.below(parent)
        if rule.style in ROWWISE and not rule.is_tensor
    }
    fused = re.search(r"gate_?up|up_?gate", name_of(path)) is not None and size // 2 in takes
    return (("blocks", (size // 2, size - size // 2)),) if style == "packed_colwise" or fused else ()


def _uneven(decl: DeclaredPlan, path: str, axis: int) -> Options:
    """Return the option for unequal parts, where the ranks do not divide an axis of a module's weight."""
    weight = getattr(decl.module(path), "weight", None)
    if weight is None or weight.dim() <= axis or weight.shape[axis] % decl.num == 0:
        return ()
    return (("uneven", True),)


def _gathered(gathers: bool) -> Options:  # noqa: FBT001  its only argument
    return (("gather_output", True),) if gathers else ()


def _split_input(whole: bool) -> Options:  # noqa: FBT001  its only argument
    return (("split_input", True),) if whole else ()
