"""Splits whose parts differ in size, and vocabularies that do not divide: SP023, SP024."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from attrs import evolve

from ....specs.dtypes import human_bytes
from ....specs.finding import Finding
from ....specs.paths import module_of
from ....specs.text_table import ranges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....specs.mesh import Mesh, MeshAxis
    from ....specs.param import ParamSpec
    from ....specs.plan import Plan
    from ....specs.report import Report
    from ....specs.shard import Shard
    from ...dialects import Dialect

IDLE_SHARE = 0.05
"""Share of a matrix product's time that ranks wait for the largest part, from which uneven parts are reported."""

IDLE_BYTES = 2**20
"""Bytes of the largest part from which its product takes longer than the launch of its kernel."""

VOCABULARY_BYTES = 16 * 2**20
"""Bytes from which a replicated vocabulary is reported, as for other replicas."""

PADDING_SHARE = 0.01
"""Share of the rows from which padding is reported: the head spends this share of its matrix product on it."""

_NAME = re.compile(r"(^|[._])(\w*embed\w*|wte|lm_head|shared|head|output|vocab\w*)\.weight$")


def uneven_parts(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find tensors split into parts of different sizes, empty parts among them."""
    for spec in plan.tree.values():
        for shard in spec.shards:
            size, num = spec.orig_shape[shard.axis], plan.mesh.num(shard.mesh_axis)
            if num == 1 or shard.is_even(size, plan.mesh):
                continue
            lengths = _lengths(shard, size, plan.mesh)
            longest = max(lengths)
            idle = 1 - sum(lengths) / (num * longest)
            is_large = spec.local_bytes(plan.mesh.at(pipe=spec.places(plan.mesh)[0])) >= IDLE_BYTES
            if not is_large or idle < IDLE_SHARE:
                continue
            counts = ", ".join(f"{lengths.count(n)} with {n}" for n in sorted(set(lengths), reverse=True))
            empty = [place for place, length in enumerate(lengths) if not length]
            many = len(empty) > 1
            nothing = f"; place{'s' if many else ''} {ranges(empty)} hold{'' if many else 's'} nothing" if empty else ""
            cause = (
                f"{spec.type} is split over {num} ranks in parts of different sizes: {counts}{nothing}. They wait"
                f" {100 * idle:.0f} % of their time for it"
            )
            yield Finding("SP023", "warning", spec.path, cause, _even(shard, size, num, shard.mesh_axis))


def undivided(plan: Plan, report: Report, dialect: Dialect) -> Iterator[Finding]:
    """Find vocabularies that are whole because they do not divide, and vocabularies with much padding."""
    num = plan.mesh.tensor
    for spec in plan.tree.values() if num > 1 else ():
        if is_undivided(plan, spec):
            rows, size = spec.orig_shape[0], spec.num_bytes
            fits = -(-rows // num) * num
            cause = (
                f"{spec.type} is whole on all {num} ranks along 'tensor' ({human_bytes(size)} on each), and {num} does not"
                f" divide its {rows} rows"
            )
            yield Finding(
                "SP024", "warning", spec.path, cause, f"Pad it to {fits}: {split_vocabulary(spec, pad_to_multiple=num)}"
            )
        shard = spec.on("tensor")
        if shard and shard.pad_to_multiple > 1 and spec.num_bytes >= VOCABULARY_BYTES:
            rows = spec.orig_shape[shard.axis]
            padded = num * shard.longest(rows, plan.mesh)
            least = -(-rows // num) * num
            if padded - rows >= PADDING_SHARE * rows and least < padded:
                share = f"{100 * (padded - rows) / rows:.0f} %"
                cause = f"{spec.type} has {padded - rows} rows of padding, {share} of its {rows} rows"
                yield Finding("SP024", "warning", spec.path, cause, f"pad_to_multiple={num} pads it to {least}")


FINDINGS = {"SP023": uneven_parts, "SP024": undivided}


def is_undivided(plan: Plan, spec: ParamSpec) -> bool:
    """Tell whether a tensor is a large vocabulary that is whole because ``tensor`` does not divide its rows."""
    here = plan.mesh.at(pipe=0)
    is_large = spec.local_bytes(here) >= VOCABULARY_BYTES
    return is_large and is_vocabulary(spec) and not spec.on("tensor") and spec.orig_shape[0] % plan.mesh.tensor > 0


def is_vocabulary(spec: ParamSpec) -> bool:
    """Tell whether a tensor is an embedding or a head, by its names and its two axes."""
    return len(spec.orig_shape) == 2 and any(map(_NAME.search, spec.paths))  # noqa: PLR2004  rows and features


def split_vocabulary(spec: ParamSpec, pad_to_multiple: int = 1) -> str:
    """Return the verbs that split a vocabulary at all its paths.

    >>> from shardplan.specs import ParamSpec
    >>> split_vocabulary(ParamSpec("embed_tokens.weight", (50257, 768), "float32"), pad_to_multiple=8)
    "sch.at['embed_tokens'].vocab_parallel(pad_to_multiple=8)"
    """
    padding = [f"pad_to_multiple={pad_to_multiple}"] if pad_to_multiple > 1 else []
    verbs: list[str] = []
    for module in map(module_of, spec.paths):
        is_embedding = "emb" in module or module.endswith(("wte", "shared"))
        verb, told = ("vocab_parallel", padding) if is_embedding else ("colwise", ["gather_output=True", *padding])
        verbs.append(f"sch.at[{module!r}].{verb}({', '.join(told)})")
    return " and ".join(verbs)


def _even(shard: Shard, size: int, num: int, mesh_axis: MeshAxis) -> str:
    """Return the changes that would give equal parts: fewer ranks, padding, or another size."""
    even = evolve(shard, uneven=False, allow_empty=False)
    fewer = max(n for n in range(1, num) if n == 1 or even.misfit(size, n) is None)
    ways = [f"Mesh({mesh_axis}={fewer}) divides it"] if fewer > 1 else []
    if not shard.blocks:
        enough = -(-size // (num * shard.granule)) * num * shard.granule
        ways += ["pad_to_multiple fills it up with zeros"] if shard.axis == 0 and shard.granule == 1 else []
        ways.append(f"a model with {enough} in place of {size} has equal parts")
    text = "; or ".join(ways) or "Blocks that divide have equal parts"
    return text[0].upper() + text[1:]


@cache
def _lengths(shard: Shard, size: int, mesh: Mesh) -> tuple[int, ...]:
    """Return the number of entries at each place along a shard's mesh axis."""
    places = range(mesh.num(shard.mesh_axis))
    return tuple(shard.length(size, mesh.at(**{shard.mesh_axis: place})) for place in places)
