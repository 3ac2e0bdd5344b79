"""Regions between linear modules in which no operator mixes the entries of a factor, so that ranks can share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from ....specs.paths import join
from ...model.linear import linear_of
from .factors import Axis, Factor, count, representative, segments, size_of, spell
from .gradient_sums import GradientSums, gradient_sums

if TYPE_CHECKING:
    from ....specs.shard import Split
    from .propagate import GraphOperation, GraphTensor, ModelAxes
    from .related_axes import Axes


@frozen(eq=False)
class Region:
    """Linear modules and the operations between them, over which a factor is split.

    Args:
        leaf: The factor that is split: heads, or features of an MLP.
        repeated: The factor that is split further where ranks share an entry of ``leaf``: the query heads of a key head.
        columns: Modules whose output features are split, and how.
        rows: Modules whose input features are split, and how.
        tensors: Other tensors that are split: their axis, and how.
        sums: Whole tensors and outputs that meet parts of activations, so that their gradients are summed.
        operations: The operations on parts of activations.
        is_attention: Whether a softmax is taken within it.
    """

    leaf: Factor
    repeated: Factor | None
    columns: Mapping[str, Split]
    rows: Mapping[str, Split]
    tensors: Mapping[str, tuple[int, Split]]
    sums: GradientSums
    operations: tuple[GraphOperation, ...] = field(repr=False)

    @property
    def is_attention(self) -> bool:
        """Tell whether a softmax is taken within it."""
        return any("softmax" in op.name or op.name == "scaled_dot_product_attention" for op in self.operations)

    @property
    def modules(self) -> frozenset[str]:
        """Its linear modules."""
        return frozenset((*self.columns, *self.rows))

    def local_sizes(self, num_ranks: int) -> dict[Factor, int]:
        """Return the number of entries on each rank, for each factor that is split."""
        sizes = {self.leaf: max(1, self.leaf.size // num_ranks)}
        if self.repeated is not None:
            sizes[self.repeated] = self.repeated.size // (num_ranks // self.leaf.size)
        return sizes


@frozen(eq=False)
class RefusedRegion:
    """A factor that cannot be split, though linear modules make it and sum over it.

    Args:
        modules: The linear modules.
        reason: Why it cannot be split.
    """

    modules: frozenset[str]
    reason: str


Outcome = Region | RefusedRegion
"""A region that can be split, or cannot."""


def find_regions(found: ModelAxes, num_ranks: int) -> list[Outcome]:
    """Return the regions that can be split over a number of ranks, shortest first, and those that cannot."""
    made, summed = _linear_leaves(found)
    outcomes: list[Outcome] = []
    for leaf in made:
        modules = frozenset(made[leaf] | summed.get(leaf, set()))
        if leaf not in summed or leaf.reason:
            continue
        outcome = _region(found, leaf, num_ranks)
        if outcome is not None:
            outcomes.append(RefusedRegion(modules, outcome) if isinstance(outcome, str) else outcome)
    return _without_conflicts(found, outcomes)


def _linear_leaves(found: ModelAxes) -> tuple[dict[Factor, set[str]], dict[Factor, set[str]]]:
    """Return, for each leaf, the linear modules that make it, and the linear modules that sum over it."""
    made: dict[Factor, set[str]] = {}
    summed: dict[Factor, set[str]] = {}
    for op in found.operations:
        if op.weight:
            out_axis, in_axis = _weight_axes(found, op)
            for leaf in _leaves(out_axis):
                made.setdefault(leaf, set()).add(op.module)
            for leaf in _leaves(in_axis):
                summed.setdefault(leaf, set()).add(op.module)
    return made, summed


def _weight_axes(found: ModelAxes, op: GraphOperation) -> tuple[Axis, Axis]:
    kind = linear_of(found.model.get_submodule(op.module))
    assert kind is not None, "its module is a linear one"
    axes = found.tensors[op.weight].axes
    return axes[kind.out_axis], axes[kind.in_axis]


def _leaves(axis: Axis) -> Iterator[Factor]:
    for factor in spell(axis):
        if factor.kind == "sum":
            for inner in segments(factor):
                yield from _leaves((inner,))
        else:
            yield factor


def _region(found: ModelAxes, leaf: Factor, num_ranks: int) -> Region | str | None:
    """Return the region of a leaf, or why it cannot be split; None if another factor is to be split instead."""
    for op in found.operations:
        if op.weight and any(count(a, leaf) and _blocks(a, leaf, None) is None for a in _weight_axes(found, op)):
            return None
    repeated = _repeated(found, leaf) if leaf.size % num_ranks else None
    divides = repeated is not None and not num_ranks % leaf.size and not repeated.size % (num_ranks // leaf.size)
    if leaf.size % num_ranks and not divides:
        return f"there are {leaf.size} of what would be split, and {num_ranks} ranks do not divide them"
    if any(count(axis, leaf) < 0 or _num(tensor.axes, leaf) > 1 for tensor in _all_tensors(found) for axis in tensor.axes):
        return "what would be split is there twice, or in a part of a tensor only"
    operations = tuple(op for op in found.operations if any(_num(tensor.axes, leaf) for tensor in (*op.inputs, *op.outputs)))
    sums = gradient_sums(found, ((op, tensor) for op in operations for tensor in _whole_and_trained(found, op, leaf)))
    if isinstance(sums, str):
        return sums
    return _with_splits(found, Region(leaf, repeated, {}, {}, {}, sums, operations), num_ranks)


def _with_splits(found: ModelAxes, region: Region, num_ranks: int) -> Region | str | None:
    """Return the region with the split of each of its tensors, or why a tensor cannot be split."""
    leaf = region.leaf
    columns: dict[str, Split] = {}
    rows: dict[str, Split] = {}
    tensors: dict[str, tuple[int, Split]] = {}
    done: set[str] = set()
    for op in region.operations:
        for axis, modules in zip(_weight_axes(found, op), (columns, rows), strict=True) if op.weight else ():
            if count(axis, leaf):
                split = _split(axis, leaf, region.repeated, num_ranks)
                if isinstance(split, str):
                    return split
                modules[op.module] = split
                done |= {op.weight, join(op.module, "bias")}
    for path, tensor in found.tensors.items():
        for at, axis in enumerate(tensor.axes):
            if count(axis, leaf) and not done & set(found.tree[path].paths):
                split = _split(axis, leaf, region.repeated, num_ranks)
                if isinstance(split, str):
                    return split
                tensors[path] = at, split
    return evolve(region, columns=columns, rows=rows, tensors=tensors) if rows and columns else None


def _all_tensors(found: ModelAxes) -> Iterator[GraphTensor]:
    yield from found.tensors.values()
    for op in found.operations:
        yield from op.outputs


def _num(axes: Axes, leaf: Factor) -> int:
    return sum(abs(count(axis, leaf)) for axis in axes)


def _whole_and_trained(found: ModelAxes, op: GraphOperation, leaf: Factor) -> Iterator[GraphTensor]:
    """Iterate over trained whole tensors that meet parts, or are spread over them, so that their gradients are partial."""
    weight = found.tensors[op.weight] if op.weight else None
    is_split = weight is not None and _num(weight.axes, leaf) > 0
    if is_split:
        return  # the input of split columns, the bias after split rows: their verbs see to them
    for tensor in op.inputs:
        if tensor.is_trained and not _num(tensor.axes, leaf):
            yield tensor


def _repeated(found: ModelAxes, leaf: Factor) -> Factor | None:
    """Return the factor that directly follows a leaf in every tensor that has it: the query heads of a key head."""
    behind: set[Factor] = set()
    for op in found.operations:
        if op.weight:
            for axis in _weight_axes(found, op):
                factors = [f for inner in spell(axis) for segment in segments(inner) for f in _leaves((segment,))]
                behind |= {b for a, b in pairwise(factors) if a is leaf and not b.reason}
    candidates = [factor for factor in behind if _is_everywhere_behind(found, leaf, factor)]
    return candidates[0] if len(candidates) == 1 else None


def _is_everywhere_behind(found: ModelAxes, leaf: Factor, other: Factor) -> bool:
    """Tell whether a factor always directly follows the leaf, and some tensor has the leaf alone."""
    alone = False
    for tensor in _all_tensors(found):
        factors = [factor for axis in tensor.axes for factor in _leaves(axis)]
        has = [at for at, factor in enumerate(factors) if factor is other]
        if any(at == 0 or factors[at - 1] is not leaf for at in has):
            return False
        alone |= leaf in factors and not has
    return alone


def _split(axis: Axis, leaf: Factor, repeated: Factor | None, num_ranks: int) -> Split | str:
    """Return the split of an axis that splits the leaf, or why there is none."""
    blocks = _blocks(axis, leaf, repeated)
    if blocks is None:
        return "a tensor that belongs to it is laid out in another way"
    granules = [granule for _, granule in blocks]
    split: Split = {}
    if len(blocks) > 1:
        split["blocks"] = tuple(size for size, _ in blocks)
    if (granule := gcd(*granules)) > 1:
        split["granule"] = granule
    if any(size // granule % num_ranks for size, granule in blocks):
        if len(set(granules)) > 1:
            return "its blocks have granules of different sizes"
        split["replicate"] = True
    return split


def _blocks(axis: Axis, leaf: Factor, repeated: Factor | None) -> list[tuple[int, int]] | None:
    """Return the blocks of an axis, each with its granule; None if a slower factor would be split instead of the leaf."""
    factors = list(spell(axis))
    at = next(at for at, factor in enumerate(factors) if count((factor,), leaf))
    outer, inner = factors[:at], factors[at + 1 :]
    if not all(factor.is_picked for factor in outer):
        return None
    if factors[at] is leaf:
        granule = size_of(inner[1:] if inner and inner[0] is repeated else inner)
        blocks = [(size_of(factors[at:]), granule)]
    else:
        blocks = []
        for segment in segments(factors[at]):
            if not count((segment,), leaf):
                continue
            found = _blocks((segment,), leaf, repeated)
            if found is None:
                return None
            blocks += [(size * size_of(inner), granule * size_of(inner)) for size, granule in found]
    return blocks * size_of(outer)


def _without_conflicts(found: ModelAxes, outcomes: list[Outcome]) -> list[Outcome]:
    """Return the outcomes without regions that split a tensor of a shorter region along its other axis."""
    place = {id(op): at for at, op in enumerate(found.operations)}

    def span(region: Region) -> tuple[int, int]:
        places = [place[id(op)] for op in region.operations]
        return max(places) - min(places), min(places)

    kept: list[Outcome] = [outcome for outcome in outcomes if isinstance(outcome, RefusedRegion)]
    taken: set[str] = set()
    for region in sorted((outcome for outcome in outcomes if isinstance(outcome, Region)), key=span):
        tensors = {path for module in region.modules for path in _tensors_of(found, module)} | set(region.tensors)
        if taken & tensors:
            kept.append(RefusedRegion(region.modules, "its weights are split along their other axis"))
        else:
            taken |= tensors
            kept.append(region)
    return kept


def _tensors_of(found: ModelAxes, module: str) -> Iterator[str]:
    for name in ("weight", "bias"):
        if spec := found.tree.get(join(module, name)):
            yield spec.path


def is_in(axes: Axes, region: Region) -> bool:
    """Tell whether each rank has a part of a tensor of the region."""
    return any(count(axis, representative(region.leaf)) for axis in axes)
