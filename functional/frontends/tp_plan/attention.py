"""Attention whose heads are split: projections, norms of heads, tensors with an entry for each head, dropout."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ....specs.errors import Problem
from ....specs.verb_call import Options, VerbCall
from .declared import COLWISE, ROWWISE
from .dropouts import dropouts_of_heads
from .heads import Heads, counts_heads, forward_source, local_sizes, read_heads

if TYPE_CHECKING:
    from .declared import DeclaredPlan, DeclaredRule


def split_attention(decl: DeclaredPlan, path: str) -> Iterator[VerbCall | Problem]:
    """Iterate over the calls that split the heads of an attention module; none if its plan splits no heads."""
    rules = [rule for rule in decl.below(path) if rule.style in (*COLWISE, *ROWWISE)]
    if not any(rule.style in COLWISE for rule in rules) or not any(rule.style in ROWWISE for rule in rules):
        return
    if norm_of_all_heads(decl, path):
        yield from _gathered(decl, rules)
        return
    heads = read_heads(decl, path)
    if isinstance(heads, Problem):
        yield heads
        return
    if problem := heads.problem() or _whole_heads(decl, path):
        yield problem
        return
    for rule in rules:
        yield from _bare(decl, heads, rule) if rule.is_tensor else _projection(decl, heads, rule)
    declared = {rule.path for rule in decl.below(path)}
    yield from _undeclared(decl, heads, declared)
    for inside in (path, *(f"{path}.{name}" for name in _beside(decl.module(path)))):
        yield from local_sizes(decl, heads, inside)
    yield from dropouts_of_heads(decl, path, [rule.path for rule in rules if rule.style in ROWWISE])


def _whole_heads(decl: DeclaredPlan, path: str) -> Problem | None:
    """Return a problem if an attention is given another activation with an entry for each head, which nobody splits."""
    module = decl.module(path)
    source = forward_source(type(module))
    given = [name for name in inspect.signature(module.forward).parameters if not re.search(r"hidden|mask|position", name)]
    found = next((name for name in given if re.search(rf"\b{name}\.(view|reshape|unflatten)\(", source)), None)
    if found is None:
        return None
    cause = f"it is given {found!r} with the features of all heads, and the plan splits its heads only"
    return Problem(path, cause, "Leave its heads whole, or cut it with a function of yours: .sync('forward_pre', own_heads)")


def norm_of_all_heads(decl: DeclaredPlan, path: str) -> str:
    """Return the path of a norm over all features of a projection, not head by head; empty if there is none.

    With such a norm, heads are split in the projections alone, and gathered after them.
    """
    for rule in (rule for rule in decl.below(path) if rule.style in COLWISE):
        projection = re.fullmatch(r"(q|k|v|query|key|value)_proj", rule.path.removeprefix(f"{path}."))
        size = getattr(decl.module(rule.path), "out_features", 0) if projection else 0
        for name, child in decl.module(path).named_children() if projection else ():
            weight = getattr(child, "weight", None)
            if projection and re.match(rf"{projection[1]}_(layer_?)?norm", name) and weight is not None:
                size_of_head = getattr(decl.module(path), "head_dim", size)
                if tuple(weight.shape) == (size,) and size > size_of_head:
                    return f"{path}.{name}"
    return ""


def _gathered(decl: DeclaredPlan, rules: Sequence[DeclaredRule]) -> Iterator[VerbCall]:
    for rule in rules:
        verb, option = ("colwise", "gather_output") if rule.style in COLWISE else ("rowwise", "split_input")
        if not rule.is_tensor:
            size = getattr(decl.module(rule.path), "out_features" if verb == "colwise" else "in_features", 0)
            uneven: Options = (("uneven", True),) if size % decl.num else ()
            yield VerbCall(rule.path, verb, (), ((option, True), *uneven))


def _projection(decl: DeclaredPlan, heads: Heads, rule: DeclaredRule) -> Iterator[VerbCall | Problem]:
    module = decl.module(rule.path)
    verb = "colwise" if rule.style in COLWISE else "rowwise"
    if not isinstance(module, nn.Linear):
        yield VerbCall(rule.path, verb)  # the verb knows other classes, and says which it does not
        return
    size = module.out_features if verb == "colwise" else module.in_features
    count = heads.count(rule.path)
    if verb == "rowwise" and _is_one_a_head(module, heads):
        yield from _own_heads(rule.path, module, heads)
        return
    if re.search(r"qkv|query_key_value", rule.path.removeprefix(heads.path)) and verb == "colwise":
        yield from _fused(rule, module, heads)
        return
    split = heads.split(count, size)
    if split is None:
        cause = f"its {size} {'outputs' if verb == 'colwise' else 'inputs'} are not {count} heads of one size"
        yield Problem(rule.path, cause, "Split it with the verbs", decl.sch.tree[f"{rule.path}.weight"].type)
    else:
        yield VerbCall(rule.path, verb, (), split)


def _fused(rule: DeclaredRule, module: nn.Linear, heads: Heads) -> Iterator[VerbCall | Problem]:
    """Split a joint projection of queries, keys and values, head by head."""
    if heads.key_value != heads.query or module.out_features % (3 * heads.query):
        cause = f"its {module.out_features} outputs are not q, k and v of {heads.query} heads one after another"
        yield Problem(rule.path, cause, "Split it with the verbs: .colwise(blocks=(q, k, v), granule=head_dim)")
    else:
        yield VerbCall(rule.path, "colwise", (), (("interleaved", heads.query),))


def _is_one_a_head(module: nn.Linear, heads: Heads) -> bool:
    return module.out_features in {heads.query, heads.key_value} and module.out_features < module.in_features


def _own_heads(path: str, module: nn.Linear, heads: Heads) -> Iterator[VerbCall | Problem]:
    """Split a projection from all heads to a number for each head: each rank keeps the numbers of its own heads."""
    inputs = heads.key_value if module.in_features % heads.key_value == 0 else heads.query
    if module.out_features % heads.num or module.bias is not None:
        why = "it has a bias" if module.bias is not None else f"{heads.num} ranks do not divide them"
        yield Problem(path, f"it gives one number for each of {module.out_features} heads, and {why}", "Leave it whole")
        return
    split = heads.split(inputs, module.in_features) or ()
    yield VerbCall(path, "shard", ("weight",), (("axis", 1), *split))
    yield VerbCall(path, "sync", ("forward_post", "reduce_scatter", -1))
    yield VerbCall(path, "set", (), (("in_features", module.in_features // heads.num),))


def _bare(decl: DeclaredPlan, heads: Heads, rule: DeclaredRule) -> Iterator[VerbCall | Problem]:
    spec = decl.sch.tree[rule.path]
    count = heads.count(rule.path)
    axis = max(len(spec.orig_shape) - 2, 0) if rule.style in COLWISE else -1
    split = heads.split(count, spec.orig_shape[axis]) if spec.orig_shape else None
    if split is None:
        yield Problem(rule.path, f"it does not hold {count} heads of one size along axis {axis}", "", spec.type)
    else:
        yield VerbCall(rule.path, "shard", (), (("axis", axis), *split))


def _undeclared(decl: DeclaredPlan, heads: Heads, declared: set[str]) -> Iterator[VerbCall]:
    """Split tensors of split heads that the plan does not name, or sum their gradients."""
    module = decl.module(heads.path)
    beside = _beside(module)
    for spec in (*decl.own(heads.path), *(spec for name in beside for spec in decl.own(f"{heads.path}.{name}"))):
        count = heads.count(spec.path)
        for num in dict.fromkeys((count, heads.query, heads.key_value)):
            is_one_a_head = num > 1 and num in spec.orig_shape and (spec.num_elements == num or spec.orig_shape[0] == num)
            is_of_one_head = (
                len(spec.orig_shape) == 1 and spec.module != heads.path and not counts_heads(decl.module(spec.module))
            )
            if is_one_a_head and not is_of_one_head and not declared & {spec.path, spec.module}:
                axis = spec.orig_shape.index(num)
                yield VerbCall(spec.path, "shard", (), (("axis", axis), *(heads.split(num, num) or ())))
                break
    for name in beside:
        norm = re.fullmatch(r"(q|k|v|query|key|value)_(layer_?)?norm", name)
        path, weight = f"{heads.path}.{name}", getattr(module.get_submodule(name), "weight", None)
        if norm and path not in declared and isinstance(weight, nn.Parameter) and weight.dim() == 1:
            projection = f"{heads.path}.{norm[1]}"
            if any(p.startswith((f"{projection}_proj", projection + ".")) for p in declared) and weight.requires_grad:
                yield VerbCall(path, "sum_gradient")


def _beside(module: nn.Module) -> list[str]:
    """Return the names of an attention module's children without linear modules."""
    return [name for name, c in module.named_children() if not any(isinstance(m, nn.Linear) for m in c.modules())]
