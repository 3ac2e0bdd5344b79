"""Embeddings of a vocabulary, and the heads that score it: large tables whose rows are shared out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen
from torch import nn

from ....specs.paths import module_of
from ...model.linear import linear_of, overrides_forward
from ...verbs.modules import wrong_embedding

if TYPE_CHECKING:
    from ....specs.param import ParamSpec
    from ...schedule import Schedule
    from .propagate import GraphOperation, ModelAxes

LARGE = 64
"""Rows from which a table is large enough to be shared out."""


@frozen
class Vocabulary:
    """A table whose rows are split.

    Args:
        table: Path of its weight.
        embeddings: Modules that look rows up.
        heads: Linear modules whose outputs are scores of its rows: tied to it, or as long.
    """

    table: str
    embeddings: tuple[str, ...]
    heads: tuple[str, ...]


def find_vocabularies(sch: Schedule, found: ModelAxes) -> tuple[list[Vocabulary], dict[str, str]]:
    """Return the tables to split, and for each other table why it stays whole."""
    tables: list[Vocabulary] = []
    reasons: dict[str, str] = {}
    lookups: dict[str, list[GraphOperation]] = {}
    for op in found.operations:
        if op.name == "embedding" and (path := op.inputs[0].parameter):
            lookups.setdefault(path, []).append(op)
    for path, ops in lookups.items():
        reason = _why_whole(sch, found, path, ops)
        if reason:
            reasons[path] = reason
        else:
            heads = [op.module for op in found.operations if op.weight == path]
            tables.append(Vocabulary(path, tuple(dict.fromkeys(op.module for op in ops)), tuple(dict.fromkeys(heads))))
    return [_with_untied_heads(found, table, tables) for table in tables], reasons


def _why_whole(sch: Schedule, found: ModelAxes, path: str, ops: list[GraphOperation]) -> str:  # noqa: PLR0911  a return for each reason
    spec = sch.tree[path]
    num, rows = sch.mesh.tensor, spec.orig_shape[0]
    if not all(op.inputs[1].is_given for op in ops):
        return "it is looked up by numbers that the model makes itself, such as positions"
    if rows < LARGE:
        return f"{rows} rows are few"
    if rows % num:
        return f"it has {rows} rows, which {num} ranks do not divide: .vocab_parallel(pad_to_multiple={num}) would pad them"
    modules = {module.path: module for module in sch.modules}
    for op in ops:
        module = found.model.get_submodule(op.module)
        if (
            not _holds(spec, op.module)
            or not isinstance(module, nn.Embedding)
            or wrong_embedding(modules[op.module], module)
        ):
            return "it is looked up by code of the model's own"
    for op in found.operations:
        uses = any(tensor is found.tensors[path] for tensor in op.inputs)
        if uses and op not in ops and op.weight != path:
            return "it is also used in another way than to look up rows and to score them"
    if any(_is_split_otherwise(found, module_of(path)) for path in spec.paths):
        return "it is tied to a module that is no linear one"
    return ""


def _holds(spec: ParamSpec, module: str) -> bool:
    return any(module_of(path) == module for path in spec.paths)


def _is_split_otherwise(found: ModelAxes, module: str) -> bool:
    owner = found.model.get_submodule(module)
    if isinstance(owner, nn.Embedding):
        return False
    kind = linear_of(owner)
    return kind is None or kind.out_axis != 0 or overrides_forward(owner)


def _with_untied_heads(found: ModelAxes, table: Vocabulary, tables: list[Vocabulary]) -> Vocabulary:
    if table is not tables[0] or table.heads:
        return table
    rows = found.tree[table.table].orig_shape[0]
    tied = {head for other in tables for head in other.heads}
    return Vocabulary(table.table, table.embeddings, tuple(dict.fromkeys(_scoring(found, rows, tied))))


def _scoring(found: ModelAxes, rows: int, tied: set[str]) -> Iterator[str]:
    returned = {id(tensor) for tensor in found.returned}
    for op in found.operations:
        kind = linear_of(found.model.get_submodule(op.module)) if op.weight else None
        if kind is None or op.module in tied or found.tree[op.weight].orig_shape[kind.out_axis] != rows:
            continue
        if any(id(tensor) in returned for tensor in op.outputs) and kind.out_axis == 0:
            yield op.module
