"""Random numbers of dropout: other numbers on each rank where it works on parts of activations, the same elsewhere."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import nn

from ....specs.paths import module_of, name_of
from ....specs.verb_call import Options, VerbCall
from .heads import forward_source

if TYPE_CHECKING:
    from .declared import DeclaredPlan

_FUNCTION = "dropout()"
"""Name under which a call of a function, not of a submodule, is listed."""


def dropouts_of_heads(decl: DeclaredPlan, path: str, rows: Sequence[str]) -> Iterator[VerbCall]:
    """Let ranks drop attention probabilities by different random numbers, and all else by the same.

    Args:
        decl: The plan.
        path: The attention.
        rows: Its output projections, after which activations are whole.
    """
    module = decl.module(path)
    rates, layers = _rates(module), {name: m.p for name, m in module.named_modules() if isinstance(m, nn.Dropout) and m.p}
    after = _called(type(module))
    after = after[max((after.index(name_of(row)) for row in rows if name_of(row) in after), default=len(after)) :]
    if not any(re.search(r"att", name) for name in (*rates, *layers)):
        return
    yield VerbCall(path, "fork_rng")
    yield from (VerbCall(f"{path}.{name}", "share_rng") for name in layers if name in after or not re.search(r"att", name))
    if not all(re.search(r"att", name) for name in rates):
        yield from _shared_after(path, rows)


def dropouts_of_features(decl: DeclaredPlan, row: str) -> Iterator[VerbCall]:
    """Let ranks drop the features that a row-split layer takes by different random numbers.

    Args:
        decl: The plan.
        row: The layer, whose module drops some entries before it.
    """
    path = module_of(row)
    module = decl.module(path)
    called = _called(type(module))
    before = called[: called.index(name_of(row))] if name_of(row) in called else []
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout) and child.p and name in before:
            yield VerbCall(f"{path}.{name}", "fork_rng")
    if _FUNCTION in before and _rates(module):
        yield VerbCall(path, "fork_rng")
        yield from _shared_after(path, [row])


def _shared_after(path: str, rows: Sequence[str]) -> Iterator[VerbCall]:
    onwards: Options = (("onwards", True),)
    if rows:
        yield from (VerbCall(row, "share_rng", (), onwards) for row in rows)
    else:
        why: Options = (("dropout", "all ranks drop the same heads' entries, as its code drops whole activations too"),)
        yield VerbCall(path, "tag", (), why)


def _rates(module: nn.Module) -> dict[str, float]:
    return {name: value for name, value in vars(module).items() if "drop" in name and isinstance(value, float) and value}


@lru_cache(maxsize=256)
def _called(cls: type) -> list[str]:
    """Return the submodules that a class's forward calls, and its calls of ``dropout``, as its code evaluates them."""
    try:
        tree = ast.parse(textwrap.dedent(forward_source(cls)))
    except SyntaxError:
        return []
    return list(_calls(tree))


def _calls(node: ast.AST) -> Iterator[str]:
    """Iterate over the calls below a node: those of arguments before the call that they are given to."""
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
            yield name
        case ast.Call(func=ast.Attribute(attr="dropout")):
            yield _FUNCTION
        case _:
            pass
