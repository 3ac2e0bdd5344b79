"""Rows of an embedding or a head that the ranks along ``tensor`` do not divide."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from .module_paths import module_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.param import ParamSpec
    from ....specs.plan import Plan

VOCABULARY_BYTES = 16 * 2**20
"""Bytes from which an embedding that is whole is worth a word, as for other tensors that are whole."""

PADDING_SHARE = 0.01
"""Of the rows: with more, the head spends that part of its matrix product on padding."""

_NAME = re.compile(r"(^|[._])(\w*embed\w*|wte|lm_head|shared|head|output|vocab\w*)\.weight$")


def undivided(plan: Plan) -> Iterator[Finding]:
    """Find vocabularies that are left whole as they do not divide, and those with much padding."""
    num = plan.mesh.tensor
    for spec in plan.tree.values() if num > 1 else ():
        if is_undivided(plan, spec):
            rows, size = spec.orig_shape[0], spec.num_bytes
            fits = -(-rows // num) * num
            cause = (
                f"{spec.type} is whole on all {num} ranks along 'tensor' ({human_bytes(size)} on each), and {num} does not"
                f" divide its {rows} rows"
            )
            yield Finding("SP024", "warning", spec.path, cause, f"Pad it to {fits}: {split(spec, pad_to_multiple=num)}")
        shard = spec.on("tensor")
        if shard and shard.pad_to_multiple > 1 and spec.num_bytes >= VOCABULARY_BYTES:
            rows = spec.orig_shape[shard.axis]
            padded = num * shard.longest(rows, plan.mesh)
            least = -(-rows // num) * num
            if padded - rows >= PADDING_SHARE * rows and least < padded:
                share = f"{100 * (padded - rows) / rows:.0f} %"
                cause = f"{spec.type} has {padded - rows} rows of padding, {share} of its {rows} rows"
                yield Finding("SP024", "warning", spec.path, cause, f"pad_to_multiple={num} pads it to {least}")


def is_vocabulary(spec: ParamSpec) -> bool:
    """Tell whether a tensor is an embedding or a head, by its names and its two axes."""
    return len(spec.orig_shape) == 2 and any(map(_NAME.search, spec.paths))  # noqa: PLR2004  rows and features


def split(spec: ParamSpec, pad_to_multiple: int = 1) -> str:
    """Return the verbs that split a vocabulary wherever it stands.

    >>> from shardplan.specs import ParamSpec
    >>> split(ParamSpec("embed_tokens.weight", (50257, 768), "float32"), pad_to_multiple=8)
    "sch.at['embed_tokens'].vocab_parallel(pad_to_multiple=8)"
    """
    padding = [f"pad_to_multiple={pad_to_multiple}"] if pad_to_multiple > 1 else []
    verbs: list[str] = []
    for module in map(module_of, spec.paths):
        is_embedding = "emb" in module or module.endswith(("wte", "shared"))
        verb, told = ("vocab_parallel", padding) if is_embedding else ("colwise", ["gather_output=True", *padding])
        verbs.append(f"sch.at[{module!r}].{verb}({', '.join(told)})")
    return " and ".join(verbs)


def is_undivided(plan: Plan, spec: ParamSpec) -> bool:
    """Tell whether a tensor is a large vocabulary that is whole, as its rows do not divide by the ranks along ``tensor``."""
    here = plan.mesh.at(pipe=0)
    is_large = spec.local_bytes(here) >= VOCABULARY_BYTES
    return is_large and is_vocabulary(spec) and not spec.on("tensor") and spec.orig_shape[0] % plan.mesh.tensor > 0
