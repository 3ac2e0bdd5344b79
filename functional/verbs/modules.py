"""Verbs for whole modules, each spelled out in splits, synchronisations and attributes."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from ...specs.declaration import D, Declaration
from ...specs.errors import Problem
from ...specs.layout_steps import DispatchTokens, MaskPadding, SetAttributes, VocabParallel
from ...specs.module import ModuleSpec
from ...specs.paths import join
from ...specs.shard import Split
from ..model.linear import linear_of
from ..model.read import first_argument
from .selection import module_at, of_kind, or_unmatched, own_specs, selected_modules, wrong
from .splits import joined_sizes, split_named, split_tensors, with_local_size
from .syncs import with_layout, with_syncs

_LINEAR = "nn.Linear and transformers' Conv1D"
_SPELLED = '.shard("weight", axis=...) and .sync(...)'


def colwise(sch: D, *, gather_output: bool, sequence_axis: int | None, **split: Unpack[Split]) -> D:
    """Split the output features of the selected linear modules."""
    if problem := _wrong_axis(sch, sequence_axis):
        return wrong(sch, problem)
    sch, linears = of_kind(sch, linear_of, "colwise", _LINEAR, _SPELLED)
    for module in linears:
        kind = linear_of(module_at(sch, module))
        assert kind is not None, "the kind was checked"
        bias, weight = join(module.path, "bias"), join(module.path, "weight")
        sch = split_named(sch, "colwise", [module], "weight", kind.out_axis, **split)
        if bias in sch.tree:
            sch = split_named(sch, "colwise", [module], "bias", 0, **split)
        if sequence_axis is None:
            sch = with_syncs(sch, [module], "backward_post", "all_reduce")
        else:
            sch = with_syncs(sch, [module], "forward_pre", "all_gather", sequence_axis)
        sch = with_local_size(sch, module, kind.out_features, "weight", kind.out_axis)
        sizes = joined_sizes(sch, weight, kind.out_axis)
        if gather_output:
            sch = _consecutive(sch, weight, "joins its outputs in the order of ranks")
            sch = with_syncs(sch, [module], "forward_post", "all_gather", -1, sizes)
        elif sizes and split.get("pad_to_multiple", 1) > 1:
            sch = with_layout(sch, [MaskPadding(module.path, sizes)])
    return sch


def rowwise(sch: D, *, split_input: bool, sequence_axis: int | None, **split: Unpack[Split]) -> D:
    """Split the input features of the selected linear modules."""
    if problem := _wrong_axis(sch, sequence_axis):
        return wrong(sch, problem)
    sch, linears = of_kind(sch, linear_of, "rowwise", _LINEAR, _SPELLED)
    for module in linears:
        kind = linear_of(module_at(sch, module))
        assert kind is not None, "the kind was checked"
        sch = split_named(sch, "rowwise", [module], "weight", kind.in_axis, **split)
        if split_input:
            sch = _consecutive(sch, join(module.path, "weight"), "cuts its input in the order of ranks")
            sizes = joined_sizes(sch, join(module.path, "weight"), kind.in_axis)
            sch = with_syncs(sch, [module], "backward_post", "all_gather", -1, sizes)
        if sequence_axis is None:
            sch = with_syncs(sch, [module], "forward_post", "all_reduce")
        else:
            sch = with_syncs(sch, [module], "forward_post", "reduce_scatter", sequence_axis)
        sch = with_local_size(sch, module, kind.in_features, "weight", kind.in_axis)
    return sch


def vocab_parallel(sch: D, *, sequence_axis: int | None, **split: Unpack[Split]) -> D:
    """Split the rows of the selected embeddings."""

    def is_embedding(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    if problem := _wrong_axis(sch, sequence_axis):
        return wrong(sch, problem)
    sch, embeddings = of_kind(sch, is_embedding, "vocab_parallel", "nn.Embedding", ".colwise() for a head")
    for module in embeddings:
        if problem := wrong_embedding(module, module_at(sch, module)):
            sch = wrong(sch, problem)
        sch = split_named(sch, "vocab_parallel", [module], "weight", 0, **split)
        path = join(module.path, "weight")
        size, shard = sch.tree[path].orig_shape[0], sch.tree[path].on("tensor")
        if shard is None or shard.axis or shard.misfit(size, sch.mesh.tensor):
            continue  # a problem already
        sch = _consecutive(sch, path, "looks up rows that follow one another")
        sch = with_layout(sch, [VocabParallel(module.path, shard.longest(size, sch.mesh))])
        if sequence_axis is None:
            sch = with_syncs(sch, [module], "forward_post", "all_reduce")
        else:
            sch = with_syncs(sch, [module], "forward_post", "reduce_scatter", sequence_axis)
        sch = with_local_size(sch, module, "num_embeddings", "weight", 0)
    return sch


def wrong_embedding(module: ModuleSpec, found: nn.Module) -> Problem | None:
    """Return why the rows of an embedding cannot be split, if they cannot."""
    if getattr(found, "max_norm", None) is not None or getattr(found, "scale_grad_by_freq", False):
        cause = "max_norm and scale_grad_by_freq look at all rows, and each rank has some"
        return Problem(module.path, cause, "Leave it whole, or do without them")
    name = first_argument(found)
    if name not in ("input", "input_ids", "ids"):
        cause = f"the forward of {type(found).__name__} takes {name!r} first, and not the ids of rows"
        return Problem(module.path, cause, "Leave it whole")
    return None


def expert_parallel(sch: D) -> D:
    """Spread the experts of the selected modules over ``expert``."""
    sch = or_unmatched(sch, modules=True)
    for module in selected_modules(sch):
        num = getattr(module_at(sch, module), "num_experts", None)
        held = own_specs(sch, module)
        alike = [spec for spec in held if spec.orig_shape and spec.orig_shape[0] == num]
        if not isinstance(num, int) or not held or len(alike) < len(held):
            cause = f"its num_experts is {num!r}, and it holds {', '.join(map(str, held)) or 'no tensors itself'}"
            fix = "Select the module whose tensors all have the experts along axis 0"
            sch = wrong(sch, Problem(module.path, cause, fix))
            continue
        sch = split_tensors(sch, "expert_parallel", alike, 0, "expert")
        if num % sch.mesh.expert == 0:
            local = num // sch.mesh.expert
            sch = with_layout(sch, [SetAttributes(module.path, {"num_experts": local}), DispatchTokens(module.path, local)])
    return sch


def _wrong_axis(sch: Declaration, axis: object) -> Problem | None:
    """Return a problem if the axis along which a sequence is split is no integer."""
    if axis is None or (isinstance(axis, int) and not isinstance(axis, bool)):
        return None
    cause = f"the axis along which a sequence is split is an integer, not {axis!r}"
    return Problem(sch.selected, cause, "sequence_axis=1")


def _consecutive(sch: D, path: str, needs: str) -> D:
    """Note a problem unless the parts of a tensor, joined in the order of ranks, are the tensor."""
    spec = sch.tree[path]
    shard = spec.on("tensor")
    if shard is None or not (shard.blocks or shard.replicate) or sch.mesh.tensor == 1:
        return sch
    cause = f"its module {needs}, and its blocks and repeated granules are not in that order"
    return wrong(sch, Problem(path, cause, "Split it as one block, without replicate", spec.type))
